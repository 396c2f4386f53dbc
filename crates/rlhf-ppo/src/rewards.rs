//! From a score per response and a divergence per token to a reward per token.

use rlhf_core::{Error, Result, check_same_shape};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Which step of an episode receives the response's score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScorePosition {
    /// The step of the last token; the episode ends with it, and the state after it is worth 0.
    /// OpenRLHF, DeepSpeed-Chat, safe-rlhf, and the textbook.
    LastToken,
    /// One step past the last token where the response is shorter than the limit, the last token
    /// otherwise: the state after the last token is then one more state with a learnt value.
    /// lm-human-preferences, Huang et al. 2024, TRL.
    AfterLastToken,
}

/// What [`shaped_rewards`] reads.
#[derive(Debug)]
pub struct ShapedRewardsInput<'a> {
    /// Divergence from the reference at each token, nats. `[B, R]` f32.
    pub kl: &'a Tensor,
    /// The response tokens that exist: a prefix of each row. `[B, R]` bool.
    pub mask: &'a Tensor,
    /// One per response. `[B]` f32.
    pub scores: &'a Tensor,
    /// Coefficient of the penalty.
    pub kl_coef: f64,
    /// Where the score goes.
    pub score_position: ScorePosition,
    /// The limit on response tokens. A response of this length has no step after its last token.
    pub max_response_len: usize,
}

/// What [`shaped_rewards`] returns.
#[derive(Debug)]
pub struct ShapedRewards {
    /// `[B, R + 1]` f32, 0 outside [`mask`](Self::mask).
    pub rewards: Tensor,
    /// The steps of each episode: the states whose values are learnt. `[B, R + 1]` bool.
    pub mask: Tensor,
}

/// `r_t = −kl_coef·kl_t`, plus the score at the [`ScorePosition`]
/// (Stiennon et al. 2020, arXiv 2009.01325, section 3.4).
///
/// Under [`ScorePosition::LastToken`] an empty response has no step, and its score goes nowhere.
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn shaped_rewards(input: &ShapedRewardsInput<'_>) -> Result<ShapedRewards> {
    check_same_shape(("kl", input.kl), ("mask", input.mask))?;
    let (rows, width) = match input.kl.size()[..] {
        [rows, width] => (rows, width),
        ref other => return Err(not_two_dimensional(other)),
    };
    if input.scores.size() != [rows] {
        return Err(Error::ShapeMismatch {
            left: "scores",
            left_shape: input.scores.size(),
            right: "the rows of kl",
            right_shape: vec![rows],
        });
    }
    let device = input.kl.device();
    let lengths = input
        .mask
        .sum_dim_intlist([1i64].as_slice(), true, Kind::Int64);
    let columns = Tensor::arange(width + 1, (Kind::Int64, device)).unsqueeze(0);
    let last_token = &lengths - 1;
    let score_column = match input.score_position {
        ScorePosition::LastToken => last_token,
        ScorePosition::AfterLastToken => {
            let full = lengths.ge(input.max_response_len as i64);
            last_token.where_self(&full, &lengths)
        }
    };
    let mask = columns.le_tensor(&score_column);
    let penalty = (input.kl * -input.kl_coef).masked_fill(&input.mask.logical_not(), 0.0);
    let score = input.scores.unsqueeze(1) * columns.eq_tensor(&score_column);
    Ok(ShapedRewards {
        rewards: penalty.constant_pad_nd([0, 1]) + score,
        mask,
    })
}

fn not_two_dimensional(shape: &[i64]) -> Error {
    Error::ShapeMismatch {
        left: "kl",
        left_shape: shape.to_vec(),
        right: "[B, R]",
        right_shape: vec![-1, -1],
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shape(position: ScorePosition) -> (Vec<f32>, Vec<bool>) {
        // Responses of 2, 3 (the limit) and 0 tokens; the KL past the end must not leak.
        let kl = Tensor::from_slice2(&[[1f32, 2.0, 99.0], [1.0, 2.0, 3.0], [99.0, 99.0, 99.0]]);
        let mask = Tensor::from_slice2(&[
            [true, true, false],
            [true, true, true],
            [false, false, false],
        ]);
        let out = shaped_rewards(&ShapedRewardsInput {
            kl: &kl,
            mask: &mask,
            scores: &Tensor::from_slice(&[10f32, 20.0, 30.0]),
            kl_coef: 0.5,
            score_position: position,
            max_response_len: 3,
        })
        .unwrap();
        (
            Vec::try_from(out.rewards.view(-1)).unwrap(),
            Vec::try_from(out.mask.view(-1)).unwrap(),
        )
    }

    #[test]
    fn at_the_last_token() {
        let (rewards, mask) = shape(ScorePosition::LastToken);
        assert_eq!(rewards[..4], [-0.5, 9.0, 0.0, 0.0]);
        assert_eq!(rewards[4..8], [-0.5, -1.0, 18.5, 0.0]);
        assert_eq!(rewards[8..], [0.0; 4]);
        assert_eq!(mask[..4], [true, true, false, false]);
        assert_eq!(mask[8..], [false; 4]);
    }

    #[test]
    fn after_the_last_token() {
        let (rewards, mask) = shape(ScorePosition::AfterLastToken);
        assert_eq!(rewards[..4], [-0.5, -1.0, 10.0, 0.0]);
        assert_eq!(rewards[4..8], [-0.5, -1.0, 18.5, 0.0]);
        assert_eq!(rewards[8..], [30.0, 0.0, 0.0, 0.0]);
        assert_eq!(mask[..4], [true, true, true, false]);
        assert_eq!(mask[4..8], [true, true, true, false]);
    }
}
