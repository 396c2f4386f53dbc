//! Gradients in f64 against differences.

use super::*;

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
