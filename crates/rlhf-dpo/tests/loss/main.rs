//! The losses against reference values made by running TRL, against finite differences, and
//! against their definitions where TRL has none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use rlhf_dpo::tch::{Device, Kind, Tensor};
use rlhf_dpo::{
    BatchMeans, Divergence, DpoConfig, DpoInputs, DpoLoss, Error, Objective, PairWeighting,
    PromptLogprobs, ReferenceLogprobs, RewardShift, dpo_loss,
};

const CASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/loss_pairs");

struct Pairs(HashMap<String, Tensor>);

impl Pairs {
    fn read() -> Self {
        let tensors = Tensor::read_safetensors(format!("{CASE}/tensors.safetensors")).unwrap();
        Self(tensors.into_iter().collect())
    }

    /// Losses, and the gradients of their sum in both policy log-probs.
    fn run(&self, loss: DpoLoss, divergence: Divergence, beta: f64) -> [Tensor; 3] {
        let leaf = |name: &str| self.0[name].copy().set_requires_grad(true);
        let (chosen, rejected) = (leaf("policy_chosen_logps"), leaf("policy_rejected_logps"));
        let inputs = DpoInputs {
            policy_chosen: &chosen,
            policy_rejected: &rejected,
            reference: Some(ReferenceLogprobs {
                chosen: &self.0["ref_chosen_logps"],
                rejected: &self.0["ref_rejected_logps"],
            }),
            chosen_lengths: &self.0["chosen_lengths"],
            rejected_lengths: &self.0["rejected_lengths"],
            prompt: None,
            pair_weights: None,
            means: None,
        };
        let out = dpo_loss(inputs, loss, divergence, beta).unwrap();
        out.losses.sum(Kind::Float).backward();
        [out.losses.detach(), chosen.grad(), rejected.grad()]
    }
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let bound = want.abs().clamp_min(1.0) * tolerance;
    let excess = ((got - want).abs() - bound).max().double_value(&[]);
    assert!(excess <= 0.0, "{what}: {got:?} is not {want:?}");
}

fn configured(run: &serde_json::Value) -> (DpoLoss, Divergence) {
    let label_smoothing = run["label_smoothing"].as_f64().unwrap_or(0.0);
    let loss = match run["loss_type"].as_str().unwrap() {
        "sigmoid" => DpoLoss::default(),
        "robust" => DpoLoss::Robust { label_smoothing },
        "exo_pair" => DpoLoss::ExoPair { label_smoothing },
        "aot" => DpoLoss::Aot { label_smoothing },
        "aot_unpaired" => DpoLoss::AotUnpaired { label_smoothing },
        "discopop" => DpoLoss::Discopop { temperature: 0.05 },
        "bco_pair" => DpoLoss::BcoPair {
            shift: RewardShift::None,
        },
        simple => serde_json::from_value(simple.into()).unwrap(),
    };
    let divergence = match run["f_divergence_type"].as_str() {
        None => Divergence::ReverseKl,
        Some("forward_kl") => Divergence::ForwardKl,
        Some("js_divergence") => Divergence::JensenShannon,
        Some("alpha_divergence") => Divergence::Alpha {
            alpha: run["f_alpha_divergence_coef"].as_f64().unwrap(),
        },
        Some(other) => panic!("unknown divergence {other}"),
    };
    (loss, divergence)
}

#[test]
fn values_and_gradients_are_those_of_trl() {
    let text = std::fs::read_to_string(format!("{CASE}/case.json")).unwrap();
    let case: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tolerance = case["tolerance"]["rel"].as_f64().unwrap();
    let pairs = Pairs::read();
    let mut checked = 0;
    for run in case["params"]["runs"].as_array().unwrap() {
        let key = run["key"].as_str().unwrap();
        let (loss, divergence) = configured(run);
        let [losses, chosen, rejected] = pairs.run(loss, divergence, run["beta"].as_f64().unwrap());
        let want = |name: &str| &pairs.0[&format!("{key}/{name}")];
        let check = |name: &str, got: &Tensor| {
            assert_close(&format!("{key}/{name}"), got, want(name), tolerance);
        };
        check("losses", &losses);
        check("grad_policy_chosen", &chosen);
        check("grad_policy_rejected", &rejected);
        let mean = losses.mean(Kind::Double).double_value(&[]);
        let want = run["mean"].as_f64().unwrap();
        assert!(
            (mean - want).abs() <= tolerance * want.abs().max(1.0),
            "{key}"
        );
        checked += 1;
    }
    assert_eq!(checked, 18);
}

/// Some pairs in f64, with all that any loss may read.
struct Doubles {
    policy: [Tensor; 3],
    reference: [Tensor; 2],
    lengths: [Tensor; 3],
    pair_weights: Tensor,
}

impl Doubles {
    fn new() -> Self {
        let of = |x: [f64; 4]| Tensor::from_slice(&x);
        Self {
            // Chosen, rejected, prompt.
            policy: [
                of([-3.1, -9.0, -5.5, -2.2]),
                of([-4.0, -6.5, -7.1, -3.9]),
                of([-8.0, -2.5, -6.0, -1.0]),
            ],
            reference: [of([-3.6, -8.1, -6.4, -2.5]), of([-3.3, -7.7, -6.2, -3.5])],
            lengths: [
                of([3.0, 4.0, 5.0, 2.0]),
                of([2.0, 5.0, 4.0, 3.0]),
                of([4.0, 1.0, 3.0, 2.0]),
            ],
            pair_weights: of([0.5, 1.5, 0.7, 1.0]),
        }
    }

    /// Sum of the losses, and with `grads` their gradients.
    fn sum(&self, objective: &Objective, grads: bool) -> (f64, Vec<Tensor>) {
        let leaves = [0, 1, 2].map(|i| self.policy[i].copy().set_requires_grad(grads));
        let referenced = objective.losses.iter().all(|l| {
            !matches!(
                l.loss,
                DpoLoss::SimPo { .. }
                    | DpoLoss::AlphaPo { .. }
                    | DpoLoss::Cpo { .. }
                    | DpoLoss::Orpo
            )
        });
        let inputs = DpoInputs {
            policy_chosen: &leaves[0],
            policy_rejected: &leaves[1],
            reference: referenced.then_some(ReferenceLogprobs {
                chosen: &self.reference[0],
                rejected: &self.reference[1],
            }),
            chosen_lengths: &self.lengths[0],
            rejected_lengths: &self.lengths[1],
            prompt: Some(PromptLogprobs {
                logprobs: &leaves[2],
                lengths: &self.lengths[2],
            }),
            pair_weights: (objective.weighting == PairWeighting::Wpo).then_some(&self.pair_weights),
            means: Some(BatchMeans {
                chosen_tokens: 3.5,
                prompt_and_chosen_tokens: 6.0,
                reward_shift: 0.03,
            }),
        };
        let sum = objective.losses(inputs).unwrap().losses.sum(Kind::Double);
        let mut gradients = Vec::new();
        if grads {
            sum.backward();
            gradients = leaves.iter().map(Tensor::grad).collect();
        }
        (sum.double_value(&[]), gradients)
    }

    fn check_gradient(&self, name: &str, objective: &Objective) {
        let (_, gradients) = self.sum(objective, true);
        let step = 1e-5;
        let mut moved = false;
        for (column, gradient) in gradients.iter().enumerate() {
            for row in 0..4 {
                let at = |delta: f64| {
                    let other = Self::new();
                    let _ = other.policy[column].get(row).g_add_scalar_(delta);
                    other.sum(objective, false).0
                };
                let want = (at(step) - at(-step)) / (2.0 * step);
                let got = match gradient.defined() {
                    true => gradient.double_value(&[row]),
                    false => 0.0,
                };
                moved |= got.abs() > 1e-6;
                let bound = 1e-6 * want.abs().max(1.0);
                assert!(
                    (got - want).abs() < bound,
                    "{name}: column {column}, row {row}: {got} is not {want}"
                );
            }
        }
        assert!(moved, "{name} has no gradient");
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let pairs = Doubles::new();
    for (name, loss) in DpoLoss::FAMILY {
        for beta in [loss.usual_beta(), 0.7] {
            pairs.check_gradient(name, &Objective::sum([(loss, 1.0)], beta));
        }
    }
    let mut smoothed = Objective::new(DpoLoss::SimPo {
        gamma: 0.3,
        label_smoothing: 0.2,
    });
    pairs.check_gradient("smoothed SimPO", &smoothed);
    smoothed = Objective::new(DpoLoss::Aot {
        label_smoothing: 0.2,
    });
    pairs.check_gradient("smoothed AOT", &smoothed);
    pairs.check_gradient("MPO", &Objective::mpo());
    for divergence in [
        Divergence::ForwardKl,
        Divergence::JensenShannon,
        Divergence::Alpha { alpha: 0.5 },
        Divergence::Alpha { alpha: -1.0 },
    ] {
        for name in ["sigmoid", "ipo", "robust", "rpo"] {
            let mut objective = Objective::new(DpoLoss::named(name).unwrap());
            objective.divergence = divergence;
            pairs.check_gradient(&format!("{name} under {divergence:?}"), &objective);
        }
    }
    let mut weighted = Objective::mpo();
    weighted.weighting = PairWeighting::Wpo;
    pairs.check_gradient("weighted MPO", &weighted);
}

/// TRL has no cDPO; by its definition it is DPO's expected loss over labels that are flipped
/// with probability ε.
#[test]
fn conservative_dpo_mixes_both_labels() {
    let pairs = Pairs::read();
    let (e, beta) = (0.2, 0.4);
    let smoothed = DpoLoss::Sigmoid { label_smoothing: e };
    let [losses, chosen, rejected] = pairs.run(smoothed, Divergence::ReverseKl, beta);
    let logratio = |side: &str| {
        let policy = &pairs.0[&format!("policy_{side}_logps")];
        Vec::<f64>::try_from(policy - &pairs.0[&format!("ref_{side}_logps")]).unwrap()
    };
    for (i, (c, r)) in logratio("chosen")
        .iter()
        .zip(logratio("rejected"))
        .enumerate()
    {
        let u = beta * (c - r);
        let want = (1.0 - e) * (-u).exp().ln_1p() + e * u.exp().ln_1p();
        let slope = beta * (1.0 / (1.0 + (-u).exp()) - (1.0 - e));
        let at = |t: &Tensor| t.double_value(&[i as i64]);
        assert!((at(&losses) - want).abs() < 1e-5);
        assert!((at(&chosen) - slope).abs() < 1e-5);
        assert!((at(&rejected) + slope).abs() < 1e-5);
    }
}

fn one(x: f64) -> Tensor {
    Tensor::from_slice(&[x as f32])
}

/// One pair: `log π` and `log π_ref` of both answers, and their lengths.
struct OnePair([Tensor; 2], [Tensor; 2], [Tensor; 2]);

impl OnePair {
    fn new(policy: [f64; 2], reference: [f64; 2], lengths: [f64; 2]) -> Self {
        Self(policy.map(one), reference.map(one), lengths.map(one))
    }

    fn inputs(&self, referenced: bool) -> DpoInputs<'_> {
        DpoInputs {
            policy_chosen: &self.0[0],
            policy_rejected: &self.0[1],
            reference: referenced.then_some(ReferenceLogprobs {
                chosen: &self.1[0],
                rejected: &self.1[1],
            }),
            chosen_lengths: &self.2[0],
            rejected_lengths: &self.2[1],
            prompt: None,
            pair_weights: None,
            means: None,
        }
    }

    fn loss(&self, loss: DpoLoss, beta: f64, referenced: bool) -> f64 {
        let out = dpo_loss(self.inputs(referenced), loss, Divergence::ReverseKl, beta).unwrap();
        out.losses.double_value(&[0])
    }
}

fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}

#[test]
fn what_trl_does_not_have_is_by_definition() {
    // c = 1, r = -2, Δ = 3; 4 tokens and 2.
    let pair = OnePair::new([-2.0, -7.0], [-3.0, -5.0], [4.0, 2.0]);
    let beta = 0.5;
    let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    let longer = DpoLoss::RDpo { alpha: 0.25 };
    close(pair.loss(longer, beta, true), softplus(-(1.5 + 0.25 * 2.0)));
    let rpo = DpoLoss::Rpo { alpha: 2.0 };
    close(pair.loss(rpo, beta, true), softplus(-1.5) + 2.0 * 2.0 / 4.0);
    // A shift of 0.3 lowers both rewards, 0.5 and -1.
    let bco = DpoLoss::named("bco_pair_shift").unwrap();
    let mut inputs = pair.inputs(true);
    inputs.means = Some(BatchMeans {
        chosen_tokens: 4.0,
        prompt_and_chosen_tokens: 4.0,
        reward_shift: 0.3,
    });
    let out = dpo_loss(inputs, bco, Divergence::ReverseKl, beta).unwrap();
    close(
        out.losses.double_value(&[0]),
        softplus(-0.2) + softplus(-1.3),
    );
    // Without a reference: averages -0.5 and -3.5.
    let simpo = DpoLoss::SimPo {
        gamma: 0.4,
        label_smoothing: 0.0,
    };
    close(pair.loss(simpo, beta, false), softplus(-(1.5 - 0.4)));
    close(pair.loss(DpoLoss::default(), beta, false), softplus(-2.5));
}

/// A policy that is its reference, or no longer likes what was chosen, has the loss it should.
#[test]
fn equal_and_empty_answers_are_finite() {
    let equal = OnePair::new([-6.0, -6.0], [-4.0, -4.0], [3.0, 3.0]);
    let empty = OnePair::new([0.0, -6.0], [0.0, -4.0], [0.0, 3.0]);
    let nothing = OnePair::new([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]);
    for pair in [equal, empty, nothing] {
        for (name, loss) in DpoLoss::FAMILY {
            let policy = pair.0.each_ref().map(|t| t.copy().set_requires_grad(true));
            let zero = one(0.0);
            let mut inputs = pair.inputs(true);
            inputs.policy_chosen = &policy[0];
            inputs.policy_rejected = &policy[1];
            inputs.prompt = Some(PromptLogprobs {
                logprobs: &zero,
                lengths: &zero,
            });
            let out = dpo_loss(inputs, loss, Divergence::ReverseKl, 0.1).unwrap();
            out.losses.sum(Kind::Float).backward();
            let mut numbers = vec![&out.losses, &out.chosen_rewards, &out.rejected_rewards];
            let gradients = policy.map(|t| t.grad());
            numbers.extend(gradients.iter().filter(|g| g.defined()));
            for number in numbers {
                assert!(number.double_value(&[0]).is_finite(), "{name}");
            }
        }
    }
}

#[test]
fn rewards_carry_no_gradient_and_are_scaled_logratios() {
    let pair = OnePair::new([-2.0, -7.0], [-3.0, -5.0], [2.0, 2.0]);
    let chosen = pair.0[0].copy().set_requires_grad(true);
    let mut inputs = pair.inputs(true);
    inputs.policy_chosen = &chosen;
    let out = dpo_loss(inputs, DpoLoss::Hinge, Divergence::ForwardKl, 0.5).unwrap();
    assert!(!out.chosen_rewards.requires_grad());
    assert_eq!(out.chosen_rewards.double_value(&[0]), 0.5);
    assert_eq!(out.rejected_rewards.double_value(&[0]), -1.0);
}

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
