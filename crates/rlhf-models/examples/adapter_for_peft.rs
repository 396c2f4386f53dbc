//! Writes an adapter with random weights and the logits of a model with it, for
//! `scripts/check_adapter_with_peft.py` to compare with PEFT:
//!
//! ```text
//! cargo run --release -p rlhf-models --example adapter_for_peft -- BASE_DIR OUT_DIR
//! scripts/check_adapter_with_peft.py BASE_DIR OUT_DIR/adapter OUT_DIR/logits.safetensors
//! ```
//!
//! With the folder of an adapter behind `OUT_DIR`, the logits are those of a language model with that one,
//! and no other is written.

use std::path::Path;

use rlhf_models::core::{PaddingSide, Parameters, Policy, Sequence, SequenceBatch};
use rlhf_models::tch::{self, Device, Kind, Tensor};
use rlhf_models::{CausalLm, LoadOptions, LoraConfig, SequenceClassifier};

// No row ends in a padding id of the fixtures: transformers would score the token before it.
const IDS: [[i64; 7]; 2] = [[5, 9, 2, 14, 3, 8, 17], [7, 1, 1, 4, 20, 6, 11]];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let (base, out, trained) = match arguments.as_slice() {
        [_, base, out] => (base, out, None),
        [_, base, out, adapter] => (base, out, Some(adapter)),
        _ => return Err("usage: adapter_for_peft BASE_DIR OUT_DIR [ADAPTER_DIR]".into()),
    };
    let out = Path::new(out);
    std::fs::create_dir_all(out)?;
    let config = LoraConfig {
        rank: 3,
        alpha: 7.0,
        rslora: true,
        rank_pattern: [("(c_attn|q_proj|query_key_value)".to_string(), 5)].into(),
        ..LoraConfig::default()
    };
    let batch = SequenceBatch::new(IDS.iter().map(|row| Sequence::new(*row, [])).collect())?;
    let text = std::fs::read_to_string(Path::new(base).join("config.json"))?;
    let options = LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    let _guard = tch::no_grad_guard();
    let logits = if text.contains("ForSequenceClassification") {
        let mut model = SequenceClassifier::from_pretrained(base, &options)?;
        model.add_adapter(&config, 1)?;
        disturb(&model);
        model.save_adapter(out.join("adapter"))?;
        model.logits(&batch)?
    } else {
        let mut model = CausalLm::from_pretrained(base, &options)?;
        match trained {
            Some(dir) => model.load_adapter(dir)?,
            None => {
                model.add_adapter(&config, 1)?;
                disturb(&model);
                model.save_adapter(out.join("adapter"))?;
            }
        }
        model.logits(&batch.padded(0, PaddingSide::Right, Device::Cpu))?
    };
    let ids = Tensor::from_slice2(&IDS);
    Tensor::write_safetensors(
        &[("input_ids", ids), ("logits", logits)],
        out.join("logits.safetensors"),
    )?;
    Ok(())
}

fn disturb(model: &impl Parameters) {
    tch::manual_seed(0);
    for (_, mut weight) in model.named_parameters() {
        let noise = weight.randn_like() * 0.1;
        let _ = weight.g_add_(&noise);
    }
}
