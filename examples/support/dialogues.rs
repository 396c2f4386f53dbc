//! What `dialogue_dpo` needs beside the library: its data, the family by name, and the table.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rlhf::core::{Detokenize, Preference};
use rlhf::dpo::{
    AnswerTable, DpoConfig, DpoEvaluation, DpoLoss, DpoTrainer, KtoLoss, KtoObjective, Objective,
    Reference, RewardShift, SampledAnswers, ScoredPreference, ScreenConfig, screen_pairs,
};
use rlhf::models::data::{EncodeOptions, Encoded, Overlong, Rows, encode};
use rlhf::models::{CausalLm, Tokenizer};
use rlhf::reward::rouge::rouge_l;

pub(crate) type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Makes the tokenizer of a model without a chat template one of conversations.
const TEMPLATE: &str = include_str!("../data/dialogues/chat_template.jinja");

/// The tokenizer of the model in `dir`, with a chat template in any case; its files are in `out`.
pub(crate) fn tokenizer(dir: &Path, out: &Path) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_dir(dir)?;
    tokenizer.save(out)?;
    if tokenizer.has_chat_template() {
        return Ok(tokenizer);
    }
    std::fs::write(out.join("chat_template.jinja"), TEMPLATE)?;
    Ok(Tokenizer::from_dir(out)?)
}

/// Comparisons to learn from, and those that are held out.
pub(crate) struct Data {
    pub(crate) train: Vec<Preference>,
    pub(crate) valid: Vec<Preference>,
}

impl Data {
    /// Reads `train.jsonl` and `valid.jsonl` in `dir`, and says what was left out.
    pub(crate) fn read(dir: &Path, tokenizer: &Tokenizer, max_length: usize) -> Result<Self> {
        let options = EncodeOptions {
            max_tokens: Some(max_length),
            overlong: Overlong::Drop,
            ..EncodeOptions::default()
        };
        let read = |name: &str| -> Result<Vec<Preference>> {
            let rows = Rows::open(dir.join(name))?;
            let encoded: Encoded<Preference> = encode(rows, tokenizer, &options)?;
            let (pairs, report) = screen_pairs(encoded.examples, &ScreenConfig::default());
            println!("{name}: {}; {report}", encoded.counts);
            Ok(pairs)
        };
        Ok(Self {
            train: read("train.jsonl")?,
            valid: read("valid.jsonl")?,
        })
    }

    /// The prompts that are held out.
    pub(crate) fn prompts(&self) -> Vec<Arc<[i64]>> {
        self.valid.iter().map(|pair| pair.prompt.clone()).collect()
    }
}

/// What a member of the family minimises.
#[derive(Debug, Clone)]
pub(crate) enum Loss {
    Pairs(Objective),
    Labels(KtoObjective),
}

/// The losses that `--loss` asks for, by name.
pub(crate) fn family(name: &str, beta: Option<f64>) -> Result<Vec<(&'static str, Loss)>> {
    let pairs = DpoLoss::FAMILY
        .into_iter()
        .map(|(name, loss)| (name, Loss::Pairs(loss.into())));
    let bco = KtoLoss::Bco {
        shift: RewardShift::RunningMean,
    };
    let others = [
        ("mpo", Loss::Pairs(Objective::mpo())),
        ("kto", Loss::Labels(KtoLoss::Kto.into())),
        (
            "apo_zero_unpaired",
            Loss::Labels(KtoLoss::ApoZeroUnpaired.into()),
        ),
        ("bco", Loss::Labels(bco.into())),
    ];
    let mut all: Vec<_> = pairs.chain(others).collect();
    let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
    all.retain(|(known, _)| name == "all" || name == *known);
    if all.is_empty() {
        return Err(format!("--loss {name}: known are {}, and all", names.join(", ")).into());
    }
    for (_, loss) in &mut all {
        match (loss, beta) {
            (Loss::Pairs(objective), Some(beta)) => objective.beta = beta,
            (Loss::Labels(objective), Some(beta)) => objective.beta = beta,
            (_, None) => {}
        }
    }
    Ok(all)
}

/// Judges a model by its log-ratios to the reference, whatever it was trained with; gives it back.
pub(crate) fn judged(
    model: CausalLm,
    valid: &[ScoredPreference],
) -> Result<(DpoEvaluation, CausalLm)> {
    let trainer = DpoTrainer::new(model, Reference::Scored, DpoConfig::default())?;
    let evaluation = trainer.evaluate_scored(valid)?;
    Ok((evaluation, trainer.into_model()))
}

/// How a member has done on what was held out.
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) evaluation: DpoEvaluation,
    /// Nats an answer.
    pub(crate) kl: f64,
    /// ROUGE-L F1 of the likeliest answers with the good ones, in percent.
    pub(crate) rouge: f64,
    pub(crate) tokens: f64,
    pub(crate) seconds: f64,
}

/// Mean ROUGE-L F1 of `answers` with the chosen ones, in percent.
pub(crate) fn rouge(answers: &SampledAnswers, data: &Data, tokenizer: &Tokenizer) -> Result<f64> {
    let sequences = answers.completions.batch.sequences();
    let mut sum = 0.0;
    for (answer, pair) in sequences.iter().zip(&data.valid) {
        let target = tokenizer.detokenize(&pair.chosen)?;
        sum += rouge_l(&target, &tokenizer.detokenize(&answer.response)?).f1;
    }
    Ok(100.0 * sum / sequences.len() as f64)
}

/// The members side by side.
pub(crate) struct Table<'a>(pub(crate) &'a [Outcome]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |cells: [&str; 8]| {
            let [name, a, b, c, d, e, g, h] = cells;
            writeln!(
                f,
                "{name:<18} {a:>8} {b:>8} {c:>8} {d:>8} {e:>8} {g:>8} {h:>8}"
            )
        };
        line([
            "", "accuracy", "margin", "chosen", "KL", "ROUGE-L", "tokens", "seconds",
        ])?;
        for outcome in self.0 {
            let e = &outcome.evaluation;
            let beta = DpoConfig::default().objective.beta;
            let number = |x: f64| format!("{x:.2}");
            line([
                outcome.name,
                // Before, policy and reference are the same, and every pair is a tie.
                &match e.margin == 0.0 {
                    true => "-".into(),
                    false => format!("{:.1}%", 100.0 * e.accuracy),
                },
                &number(e.margin / beta),
                &number(e.chosen / beta),
                &number(outcome.kl),
                &format!("{:.1}", outcome.rouge),
                &format!("{:.1}", outcome.tokens),
                &format!("{:.1}", outcome.seconds),
            ])?;
        }
        write!(
            f,
            "accuracy, margin and chosen: held-out log-ratios to the reference, in nats an answer"
        )
    }
}

/// The first `rows` of what was sampled, before and after.
pub(crate) fn shown(
    before: &SampledAnswers,
    after: &SampledAnswers,
    tokenizer: &Tokenizer,
    rows: usize,
) -> Result<AnswerTable> {
    let mut table = AnswerTable::new(before, after, tokenizer)?;
    table.rows.truncate(rows);
    Ok(table)
}
