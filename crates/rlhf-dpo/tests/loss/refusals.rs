//! Options that make no sense, alone or together.

use super::*;

#[test]
fn wrong_parameters_are_errors() {
    let pair = OnePair::new([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]);
    let fails =
        |loss, divergence, beta| dpo_loss(pair.inputs(true), loss, divergence, beta).is_err();
    let plain = (DpoLoss::default(), Divergence::default());
    assert!(!fails(plain.0, plain.1, 0.1));
    assert!(fails(plain.0, plain.1, 0.0));
    assert!(fails(plain.0, plain.1, f64::NAN));
    assert!(fails(plain.0, Divergence::Alpha { alpha: 1.0 }, 0.1));
    let label_smoothing = 0.5;
    for loss in [
        DpoLoss::Sigmoid { label_smoothing },
        DpoLoss::Robust { label_smoothing },
        DpoLoss::Aot { label_smoothing },
        DpoLoss::ExoPair {
            label_smoothing: 0.0,
        },
        DpoLoss::Discopop { temperature: 0.0 },
        DpoLoss::RDpo { alpha: -1.0 },
        DpoLoss::AlphaPo {
            alpha: 0.0,
            gamma: 0.1,
        },
        DpoLoss::SimPo {
            gamma: f64::NAN,
            label_smoothing: 0.0,
        },
        DpoLoss::Orpo, // the prompts' log-probabilities are absent
    ] {
        assert!(fails(loss, plain.1, 0.1), "{loss:?}");
    }
    let two = Tensor::from_slice(&[1f32, 2.0]);
    let ragged = DpoInputs {
        reference: Some(ReferenceLogprobs {
            chosen: &two,
            rejected: &pair.1[1],
        }),
        ..pair.inputs(true)
    };
    assert!(dpo_loss(ragged, plain.0, plain.1, 0.1).is_err());
    let none = Tensor::zeros([0], (Kind::Float, Device::Cpu));
    let empty = DpoInputs {
        policy_chosen: &none,
        policy_rejected: &none,
        chosen_lengths: &none,
        rejected_lengths: &none,
        ..pair.inputs(false)
    };
    assert!(dpo_loss(empty, plain.0, plain.1, 0.1).is_err());
}

#[test]
fn an_option_that_a_loss_cannot_use_is_refused_with_the_reason() {
    let refused = |name: &str, change: &dyn Fn(&mut Objective)| {
        let mut objective = Objective::new(DpoLoss::named(name).unwrap());
        change(&mut objective);
        match DpoConfig::of(objective).validate() {
            Err(Error::Unusable { option, reason, .. }) => {
                assert!(reason.len() > 20);
                Some(option)
            }
            Err(other) => panic!("{other}"),
            Ok(()) => None,
        }
    };
    let divergence = |o: &mut Objective| o.divergence = Divergence::JensenShannon;
    let wpo = |o: &mut Objective| o.weighting = PairWeighting::Wpo;
    let ld = |o: &mut Objective| o.ld_alpha = Some(0.5);
    let names = |option: &dyn Fn(&mut Objective)| -> Vec<&str> {
        let family = DpoLoss::FAMILY.iter().map(|(name, _)| *name);
        family
            .filter(|name| refused(name, option).is_some())
            .collect()
    };
    assert_eq!(
        names(&divergence),
        [
            "nca_pair",
            "bco_pair",
            "bco_pair_shift",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "simpo",
            "alphapo",
            "cpo",
            "orpo"
        ]
    );
    assert_eq!(names(&wpo), ["aot", "aot_unpaired", "sft"]);
    assert_eq!(
        names(&ld),
        [
            "ipo",
            "sigmoid_norm",
            "rpo",
            "sft",
            "simpo",
            "alphapo",
            "cpo",
            "orpo"
        ]
    );
    assert_eq!(refused("aot", &wpo), Some("weighting"));
    assert_eq!(refused("ipo", &ld), Some("ld_alpha"));
    let wrong = |change: &dyn Fn(&mut Objective)| {
        let mut objective = Objective::default();
        change(&mut objective);
        assert!(matches!(objective.validate(), Err(Error::Core(_))));
    };
    wrong(&|o| o.losses.clear());
    wrong(&|o| o.losses[0].weight = -1.0);
    wrong(&|o| o.ld_alpha = Some(1.5));
    wrong(&|o| o.beta = 0.0);
}

#[test]
fn objectives_survive_json() {
    let mut objective = Objective::mpo();
    objective.divergence = Divergence::ReverseKl;
    for (_, loss) in DpoLoss::FAMILY {
        objective
            .losses
            .push(rlhf_dpo::WeightedLoss { loss, weight: 0.5 });
    }
    let json = serde_json::to_string(&objective).unwrap();
    assert_eq!(serde_json::from_str::<Objective>(&json).unwrap(), objective);
    assert_eq!(DpoLoss::named("no such loss"), None);
}
