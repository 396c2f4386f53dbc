//! Parameter groups against separate optimisers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use rlhf_scale::{AdamW, AdamWConfig, DecayRule, Error, ParamGroup, UpdateConfig, Updater};
use support::{Net, bytes, clear, config, train};
use tch::{Kind, Tensor};

fn group(pattern: &str, lr: Option<f64>, weight_decay: Option<f64>) -> ParamGroup {
    ParamGroup {
        params: vec![pattern.to_string()],
        lr,
        weight_decay,
    }
}

/// The parameters whose names begin with `prefix`.
fn part(net: &Net, prefix: &str) -> Vec<(String, Tensor)> {
    let mut params = net.aliases();
    params.retain(|(name, _)| name.starts_with(prefix));
    params
}

/// One optimiser with groups beside two without, on the same gradients: all bits agree.
fn equals_separate_optimizers(kind: Kind) {
    let base = AdamWConfig {
        lr: 0.05,
        weight_decay: 0.1,
        ..AdamWConfig::default()
    };
    let grouped = AdamWConfig {
        groups: vec![group("a.*", Some(0.02), Some(0.3))],
        ..base.clone()
    };
    let of_a = AdamWConfig {
        lr: 0.02,
        weight_decay: 0.3,
        no_decay: DecayRule::Nothing, // a group's weight decay is for all of the group
        ..base.clone()
    };
    let (net, apart) = (Net::new(kind), Net::new(kind));
    let mut together = AdamW::new(net.aliases(), &grouped).unwrap();
    let mut separate = [
        AdamW::new(part(&apart, "a."), &of_a).unwrap(),
        AdamW::new(part(&apart, "b."), &base).unwrap(),
    ];
    for (step, factor) in [1.0, 0.5, 0.25, 1.0].into_iter().enumerate() {
        for net in [&net, &apart] {
            net.loss(step as u64, 0, 8).backward();
        }
        together.step(factor).unwrap();
        for optimizer in &mut separate {
            optimizer.step(factor).unwrap();
        }
        clear(&net);
        clear(&apart);
        assert_eq!(net.bytes(), apart.bytes(), "step {step}");
    }
    let state_of = |optimizer: &AdamW| {
        let state = optimizer.state().into_iter();
        state
            .map(|(name, tensor)| (name, bytes(&tensor)))
            .collect::<Vec<_>>()
    };
    let mut expected: Vec<_> = separate.iter().flat_map(state_of).collect();
    let mut actual = state_of(&together);
    expected.sort();
    actual.sort();
    assert_eq!(actual, expected);
}

#[test]
fn groups_equal_separate_optimizers() {
    equals_separate_optimizers(Kind::Float);
}

#[test]
fn groups_of_bf16_equal_separate_optimizers() {
    equals_separate_optimizers(Kind::BFloat16);
}

#[test]
fn what_a_group_leaves_open_is_the_configs() {
    // The group's learning rate is the config's own, so only its weight decay can tell.
    let run = |groups: Vec<ParamGroup>, no_decay: DecayRule| {
        let net = Net::new(Kind::Float);
        let config = UpdateConfig {
            optimizer: AdamWConfig {
                groups,
                no_decay,
                ..config().optimizer
            },
            ..config()
        };
        let mut updater = Updater::new(net.aliases(), &config).unwrap();
        for _ in 0..4 {
            train(&net, &mut updater, 1);
        }
        net.bytes()
    };
    let plain = run(vec![], DecayRule::Vectors);
    assert_eq!(run(vec![group("*", None, None)], DecayRule::Vectors), plain);
    assert_eq!(
        run(vec![group("*.bias", Some(0.05), None)], DecayRule::Vectors),
        plain
    );
    let all_decay = run(vec![], DecayRule::Nothing);
    assert_ne!(all_decay, plain);
    assert_eq!(
        run(vec![group("*.bias", None, Some(0.1))], DecayRule::Vectors),
        all_decay
    );
}

#[test]
fn a_learning_rate_of_zero_keeps_the_weights() {
    let (net, start) = (Net::new(Kind::Float), Net::new(Kind::Float));
    let mut config = config();
    config.optimizer.groups = vec![group("a.*", Some(0.0), None)];
    let mut updater = Updater::new(net.aliases(), &config).unwrap();
    for _ in 0..3 {
        train(&net, &mut updater, 1);
    }
    for name in ["a.weight", "a.bias", "b.weight"] {
        let moved = bytes(net.get(name)) != bytes(start.get(name));
        assert_eq!(moved, name == "b.weight", "{name}");
    }
}

#[test]
fn a_pattern_without_parameters_is_named() {
    let mut config = config();
    config.optimizer.groups = vec![group("a.*", None, None), group("head.*", Some(1.0), None)];
    let error = Updater::new(Net::new(Kind::Float).aliases(), &config).unwrap_err();
    assert!(matches!(error, Error::UnmatchedPattern { pattern } if pattern == "head.*"));
    config.optimizer.groups = vec![group("a.*", None, None), group("a.bias", Some(1.0), None)];
    let error = Updater::new(Net::new(Kind::Float).aliases(), &config).unwrap_err();
    assert!(matches!(error, Error::ShadowedGroup { group: 1, .. }));
}
