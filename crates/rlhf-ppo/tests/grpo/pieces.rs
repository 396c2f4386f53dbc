//! Advantages and losses against TRL 1.16, by hand where it has none, and by finite differences.

mod advantages;
mod by_hand;
mod goldens;
mod properties;

use rlhf_ppo::tch::{Device, Kind, Tensor};
use rlhf_ppo::{
    AdvantageScale, Aggregation, Baseline, Clip, GroupAdvantagesInput, GroupLoss, GroupLossInput,
    KlEstimator, KlPenalty, KlWeight, Objective, RatioLevel, TokenWeightsInput, group_advantages,
    group_loss, mixed_rewards, token_weights,
};
use serde_json::Value;

use crate::common::{Golden, assert_close, assert_number, number};

/// What a loss reads, from a golden or made up.
struct Case {
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
}

/// How the loss is made.
#[derive(Clone, Copy, Debug)]
struct Method {
    ratio: RatioLevel,
    objective: Objective,
    kl: KlPenalty,
    aggregation: Aggregation,
}

const BUDGET: usize = 12;

impl Case {
    fn weights(&self, aggregation: Aggregation) -> Tensor {
        let tokens = self.mask.sum(Kind::Double).double_value(&[]);
        let input = TokenWeightsInput {
            mask: &self.mask,
            rollout_tokens: tokens,
            minibatches: 1.0,
            max_new_tokens: BUDGET,
        };
        token_weights(aggregation, &input).unwrap()
    }

    /// The loss of these rows, with the weights that they have in the whole.
    fn loss_of(&self, method: Method, rows: std::ops::Range<i64>) -> GroupLoss {
        let cut = |t: &Tensor| t.slice(0, rows.start, rows.end, 1);
        let weights = self
            .weights(method.aggregation)
            .to_kind(self.logprobs.kind());
        group_loss(&GroupLossInput {
            logprobs: &cut(&self.logprobs),
            old_logprobs: &cut(&self.old_logprobs),
            ref_logprobs: Some(&cut(&self.ref_logprobs)),
            advantages: &cut(&self.advantages),
            mask: &cut(&self.mask),
            token_weights: &cut(&weights),
            importance_weights: None,
            ratio: method.ratio,
            objective: method.objective,
            kl: method.kl,
        })
        .unwrap()
    }

    fn loss(&self, method: Method) -> GroupLoss {
        self.loss_of(method, 0..self.mask.size()[0])
    }

    fn gradient(&self, loss: &Tensor) -> Tensor {
        loss.backward();
        let gradient = self.logprobs.grad().copy();
        let _ = self.logprobs.grad().zero_();
        gradient
    }
}
