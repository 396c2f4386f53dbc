//! The model with its adapters off.

use super::*;

#[test]
fn a_reference_shares_memory_and_does_not_move() {
    for (adapter, name) in ADAPTERS {
        let plain = logprobs(&load(name));
        let model = adapted(adapter, name);
        let (mut reference, snapshot) = (model.reference().unwrap(), model.snapshot().unwrap());
        let before = logprobs(&model);
        assert!(logprobs(&reference).equal(&plain) && logprobs(&snapshot).equal(&before));
        assert!(!before.equal(&plain));
        assert!(reference.named_parameters().is_empty());
        assert!(snapshot.named_parameters().is_empty());

        train(&model);
        assert!(!logprobs(&model).equal(&before));
        assert!(logprobs(&reference).equal(&plain) && logprobs(&snapshot).equal(&before));

        // The same memory: zeros written through one are read by the others.
        reference.set_trainable(true);
        assert!(
            model
                .named_parameters()
                .iter()
                .all(|(_, w)| w.requires_grad())
        );
        let _guard = tch::no_grad_guard();
        for (_, mut weight) in reference.named_parameters() {
            let _ = weight.zero_();
        }
        let flat = plain.zeros_like();
        let uniform = |model: &CausalLm| {
            let spread = logprobs(model).masked_select(&plain.ne_tensor(&flat));
            (spread.max() - spread.min()).double_value(&[])
        };
        assert!(uniform(&model) == 0.0 && uniform(&snapshot) == 0.0);
    }
}

#[test]
fn a_reference_goes_to_another_thread() {
    let model = adapted("llama_qv", "llama");
    let reference = model.reference().unwrap();
    let expected = logprobs(&reference);
    let theirs = std::thread::spawn(move || logprobs(&reference));
    logprobs(&model).sum(Kind::Float).backward();
    assert!(theirs.join().unwrap().equal(&expected));
}

#[test]
fn copies_share_nothing() {
    let model = adapted("llama_qv", "llama");
    let copy = model.try_clone().unwrap();
    let before = logprobs(&model);
    assert!(logprobs(&copy).equal(&before));
    assert_eq!(copy.adapter(), model.adapter());
    train(&model);
    assert!(logprobs(&copy).equal(&before));
    train(&copy);
    assert!(logprobs(&copy).equal(&logprobs(&model)));
    // A classifier made of it has the adapters in its weights.
    let classifier = SequenceClassifier::from_causal_lm(&model, 1, 0).unwrap();
    assert!(classifier.adapter().is_none());
    let mut merged = model.try_clone().unwrap();
    merged.merge().unwrap();
    let of_merged = SequenceClassifier::from_causal_lm(&merged, 1, 0).unwrap();
    let scores = |model: &SequenceClassifier| model.scores(&batch()).unwrap();
    assert!(scores(&classifier).equal(&scores(&of_merged)));
}
