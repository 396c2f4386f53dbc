//! The pure functions against reference values made by running TRL 1.12.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Golden, assert_number, number};
use rlhf_ppo::core::{FinishReason, Shift, Variance, masked_mean, masked_var, masked_whiten};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{
    Clip, GaeInput, KlControl, KlController, KlEstimator, MissingEos, PolicyLossInput,
    ScorePosition, ShapedRewardsInput, ValueLossInput, Whitening, gae, policy_loss, shaped_rewards,
    truncate_after_stop, value_loss,
};

#[test]
fn adaptive_kl() {
    let case = Golden::load("adaptive_kl");
    let params = &case.json["params"];
    let mut controller = KlController::new(KlControl::ziegler());
    assert_eq!(
        controller.kl_coef(),
        params["init_kl_coef"].as_f64().unwrap()
    );
    let sequences = params["n_steps"].as_u64().unwrap() as usize;
    let observed = params["observed_kl"].as_array().unwrap();
    let expected = case.json["expect"]["kl_coef_after_each_update"]
        .as_array()
        .unwrap();
    for (kl, want) in observed.iter().zip(expected) {
        controller.observe(kl.as_f64().unwrap(), sequences);
        let want = want.as_f64().unwrap();
        assert_number(
            "kl_coef",
            controller.kl_coef(),
            want,
            0.0,
            case.tolerance("rel"),
        );
    }
}

#[test]
fn masked_statistics() {
    let case = Golden::load("masked_stats");
    let (values, mask) = (case.tensor("values"), case.tensor("mask").eq(1));
    case.close(
        "mean",
        &masked_mean(&values, &mask).unwrap(),
        &case.tensor("mean"),
    );
    for (variance, name) in [
        (Variance::Sample, "var_unbiased"),
        (Variance::Population, "var_biased"),
    ] {
        let var = masked_var(&values, &mask, variance).unwrap();
        case.close(name, &var, &case.tensor(name));
    }
    for (shift, name) in [
        (Shift::ToZero, "whiten_shift_mean"),
        (Shift::KeepMean, "whiten_keep_mean"),
    ] {
        let whitened = masked_whiten(&values, &mask, Variance::Sample, shift).unwrap();
        // TRL computes masked elements too; ours are 0.
        let want = case.tensor(name).masked_fill(&mask.logical_not(), 0.0);
        case.close(name, &whitened, &want);
    }
}

#[test]
fn responses_are_cut_at_their_first_stop_token() {
    let case = Golden::load("get_reward");
    let (eos, pad) = (0, 1);
    let rows = |name: &str| -> Vec<Vec<i64>> { Vec::try_from(case.tensor(name)).unwrap() };
    let context = case.json["params"]["context_length"].as_i64().unwrap();
    let last = Vec::<i64>::try_from(case.tensor("sequence_lengths")).unwrap();
    let truncated = rows("responses_truncated");
    for (i, mut response) in rows("responses").into_iter().enumerate() {
        let width = response.len();
        truncate_after_stop(&mut response, &[eos]);
        assert_eq!(context + response.len() as i64 - 1, last[i]);
        response.resize(width, pad);
        assert_eq!(response, truncated[i]);
    }
}

#[test]
fn losses_statistics_and_gradients() {
    let case = Golden::load("loss");
    let (mask, states) = (case.inside("padding_mask"), case.inside("padding_mask_p1"));
    let elements = mask.numel() as f64;
    for (run, params) in case.json["params"]["runs"].as_object().unwrap() {
        let param = |name: &str| params[name].as_f64().unwrap();
        let logprobs = case.tensor("new_logprobs").set_requires_grad(true);
        let values = case.tensor("vpred").set_requires_grad(true);
        let tokens = number(&mask.sum(Kind::Double));
        let policy = policy_loss(&PolicyLossInput {
            logprobs: &logprobs,
            old_logprobs: &case.tensor("old_logprobs"),
            advantages: &case.tensor("advantages"),
            mask: &mask,
            weights: None,
            clip: Clip::symmetric(param("cliprange")),
            tokens,
        })
        .unwrap();
        let value = value_loss(&ValueLossInput {
            values: &values,
            old_values: &case.tensor("old_values"),
            returns: &case.tensor("returns"),
            mask: &states,
            cliprange_value: param("cliprange_value"),
            states: number(&states.sum(Kind::Double)),
        })
        .unwrap();
        let loss = &policy.loss + &value.loss * param("vf_coef");
        loss.backward();

        // TRL averages these two over all elements, where masked ones have KL 0 and ratio 1.
        let padded = elements - tokens;
        let approx_kl = number(&policy.approx_kl) * tokens / elements;
        let ratio = (number(&policy.ratio) * tokens + padded) / elements;
        for (name, got) in [
            ("loss", number(&loss)),
            ("pg_loss", number(&policy.loss)),
            ("vf_loss", number(&value.loss)),
            ("vf_clipfrac", number(&value.clipfrac)),
            ("pg_clipfrac", number(&policy.clipfrac)),
            ("approxkl", approx_kl),
            ("ratio", ratio),
        ] {
            let want = case.json["expect"][run][name].as_f64().unwrap();
            let (abs, rel) = (case.tolerance("abs"), case.tolerance("rel"));
            assert_number(&format!("{run}/{name}"), got, want, abs, rel);
        }
        for (name, tensor) in [("grad_new_logprobs", &logprobs), ("grad_vpred", &values)] {
            let name = format!("{run}/{name}");
            case.close(&name, &tensor.grad(), &case.tensor(&name));
        }
    }
}

#[test]
fn rewards_and_advantages() {
    let case = Golden::load("rewards_gae");
    let mask = case.inside("padding_mask");
    let width = mask.size()[1];
    let finish: Vec<_> = Vec::<i64>::try_from(case.tensor("contain_eos"))
        .unwrap()
        .into_iter()
        .map(|eos| match eos {
            0 => FinishReason::Length,
            _ => FinishReason::Stop,
        })
        .collect();
    for (run, params) in case.json["params"]["runs"].as_object().unwrap() {
        let param = |name: &str| params[name].as_f64().unwrap();
        let close = |what: &str, got: &Tensor, inside: &Tensor| {
            let name = format!("{run}/{what}");
            let outside = inside.logical_not();
            // Outside the mask TRL leaves -0.0 or leftovers that it never reads.
            let want = case.tensor(&name).masked_fill(&outside, 0.0);
            case.close(&name, &got.masked_fill(&outside, 0.0), &want);
        };
        let estimator: KlEstimator =
            serde_json::from_value(params["kl_estimator"].clone()).unwrap();
        let kl = estimator.estimate(&case.tensor("logprobs"), &case.tensor("ref_logprobs"));
        close("kl", &kl, &mask);

        let rule = match params["missing_eos_penalty"].as_f64() {
            Some(penalty) => MissingEos::Subtract(penalty),
            None => MissingEos::Keep,
        };
        let shaped = shaped_rewards(&ShapedRewardsInput {
            kl: &kl,
            mask: &mask,
            scores: &rule.apply(&case.tensor("scores"), &finish).unwrap(),
            kl_coef: param("kl_coef"),
            score_position: ScorePosition::AfterLastToken,
            max_response_len: width as usize,
        })
        .unwrap();
        let states = case.inside("padding_mask_p1");
        assert_eq!(shaped.mask.narrow(1, 0, width), states);
        let whitening = match params["whiten_rewards"].as_bool().unwrap() {
            true => Whitening::Sample,
            false => Whitening::Off,
        };
        let rewards = whitening
            .apply(&shaped.rewards, &shaped.mask, Shift::KeepMean)
            .unwrap();
        close("rewards", &rewards.narrow(1, 0, width), &states);

        let out = gae(&GaeInput {
            rewards: &rewards,
            values: &case.tensor("values").constant_pad_nd([0, 1]),
            mask: &shaped.mask,
            gamma: param("gamma"),
            lam: param("lam"),
        })
        .unwrap();
        let raw = out.advantages.narrow(1, 0, width);
        close("advantages_raw", &raw, &states);
        close("returns", &out.returns.narrow(1, 0, width), &states);
        let advantages = Whitening::Sample.apply(&raw, &mask, Shift::ToZero).unwrap();
        close("advantages", &advantages, &mask);
    }
}
