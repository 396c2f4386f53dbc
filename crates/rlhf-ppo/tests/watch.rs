//! Runs that went wrong in known ways, and the findings that they give.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use common::bigram::{Bigram, STOP, TokenValue};
use rlhf_ppo::core::{Event, Observer, Stats, reward_fn};
use rlhf_ppo::{
    FindingKind, GrpoConfig, GrpoTrainer, HackingWatch, KlControl, PpoConfig, PpoTrainer, StopRule,
    WatchConfig,
};

/// A metric over a run: from its first value to its last, with noise of the given size.
type Course = (&'static str, f64, f64, f64);

const STEPS: u64 = 40;

/// White noise that is the same in every run, between −1 and 1.
fn noise(step: u64, metric: usize) -> f64 {
    let mut bits = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = bits.wrapping_add((metric as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

fn watched(config: WatchConfig, phase: &'static str, courses: &[Course]) -> HackingWatch {
    let mut watch = HackingWatch::new(config).unwrap();
    for step in 1..=STEPS {
        let share = (step - 1) as f64 / (STEPS - 1) as f64;
        let stats = courses
            .iter()
            .enumerate()
            .map(|(i, (name, from, to, size))| {
                let value = from + (to - from) * share + size * noise(step, i);
                (format!("{phase}/{name}"), value)
            });
        let stats: Stats = stats.collect();
        let event = Event {
            step,
            total_steps: Some(STEPS),
            phase,
            stats: &stats,
        };
        if watch.observe(&event).unwrap().is_break() {
            break;
        }
    }
    watch
}

fn kinds(courses: &[Course]) -> Vec<FindingKind> {
    let watch = watched(WatchConfig::default(), "ppo", courses);
    watch.findings().iter().map(|f| f.kind).collect()
}

const RISING: Course = ("score/mean", 0.0, 1.5, 0.1);
const FLAT: Course = ("score/mean", 0.3, 0.3, 0.1);
const SPREAD: Course = ("score/std", 1.0, 0.9, 0.05);

/// What a healthy run reports beside its reward.
const HEALTHY: [Course; 9] = [
    SPREAD,
    ("kl", 0.0, 8.0, 0.5),
    ("kl_target", 6.0, 6.0, 0.0),
    ("length", 20.0, 22.0, 1.0),
    ("distinct_2", 0.95, 0.93, 0.01),
    ("distinct_2_across", 0.6, 0.5, 0.03),
    ("finished", 0.9, 0.97, 0.02),
    ("policy/entropy", 2.0, 1.2, 0.1),
    ("value/explained_variance", -0.2, 0.5, 0.1),
];

#[test]
fn a_healthy_run_gives_no_finding() {
    let mut courses = vec![RISING, ("judge/gold", 0.0, 0.8, 0.1)];
    courses.extend(HEALTHY);
    assert_eq!(kinds(&courses), []);
}

#[test]
fn a_reward_that_does_not_rise_hacks_nothing() {
    let courses = [
        FLAT,
        SPREAD,
        ("kl", 0.0, 80.0, 0.5),
        ("length", 20.0, 60.0, 1.0),
        ("distinct_2", 0.95, 0.3, 0.01),
        ("judge/disagreement", 0.1, 0.5, 0.02),
        ("judge/gold", 1.0, 0.0, 0.1),
    ];
    assert_eq!(kinds(&courses), []);
}

#[test]
fn each_story_is_told_by_its_name() {
    for (other, kind) in [
        (("kl", 0.0, 60.0, 1.0), FindingKind::KlDrift),
        (("length", 20.0, 40.0, 1.0), FindingKind::LengthDrift),
        (("length", 20.0, 10.0, 1.0), FindingKind::LengthDrift),
        (("distinct_2", 0.95, 0.5, 0.02), FindingKind::Repetition),
        (
            ("distinct_2_across", 0.6, 0.1, 0.02),
            FindingKind::LostVariety,
        ),
        (
            ("judge/disagreement", 0.1, 0.4, 0.02),
            FindingKind::Disagreement,
        ),
        (("judge/gold", 0.5, -0.5, 0.1), FindingKind::GoldDecline),
        (("judge/gold", 0.5, 0.5, 0.3), FindingKind::GoldStalled),
    ] {
        let found = kinds(&[RISING, SPREAD, other]);
        assert_eq!(found, [kind], "{other:?}");
    }
    for (other, kind) in [
        (("finished", 0.95, 0.2, 0.02), FindingKind::EosCollapse),
        (("length", 20.0, 1.0, 0.5), FindingKind::ShortAnswers),
        (
            ("policy/entropy", 2.0, 0.1, 0.05),
            FindingKind::EntropyCollapse,
        ),
        (
            ("value/explained_variance", -0.5, -0.3, 0.1),
            FindingKind::DeadCritic,
        ),
        (("groups/zero_std", 0.9, 1.0, 0.0), FindingKind::IdleGroups),
    ] {
        assert_eq!(kinds(&[FLAT, SPREAD, other]), [kind], "{other:?}");
    }
}

#[test]
fn changes_within_the_noise_are_none() {
    let found = kinds(&[RISING, SPREAD, ("length", 20.0, 27.0, 25.0)]);
    assert_eq!(found, []);
    let found = kinds(&[
        ("score/mean", 0.0, 0.5, 4.0),
        SPREAD,
        ("length", 20.0, 60.0, 1.0),
    ]);
    assert_eq!(found, []);
}

#[test]
fn a_target_per_token_is_told_from_one_that_is_missed() {
    // 40 tokens at 0.06 nats each, and a controller that aims at 0.05.
    let length = ("length", 40.0, 40.0, 1.0);
    let kl = ("kl", 2.4, 2.4, 0.1);
    let found = kinds(&[FLAT, kl, length, ("kl_target", 0.05, 0.05, 0.0)]);
    assert_eq!(found, [FindingKind::KlUnits]);
    assert_eq!(kinds(&[FLAT, kl, length, ("kl_target", 2.0, 2.0, 0.0)]), []);
    assert_eq!(
        kinds(&[
            FLAT,
            ("kl", 60.0, 60.0, 0.1),
            length,
            ("kl_target", 0.05, 0.05, 0.0)
        ]),
        []
    );
}

#[test]
fn a_finding_names_the_peak_is_told_once_and_may_end_the_run() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&told);
    let config = WatchConfig {
        stop: StopRule::On {
            kinds: vec![FindingKind::GoldDecline],
            steps: 3,
        },
        ..WatchConfig::default()
    };
    let mut watch = HackingWatch::new(config)
        .unwrap()
        .on_finding(move |finding| heard.lock().unwrap().push(finding.to_string()));
    let mut last = 0;
    for step in 1..=60u64 {
        let t = step as f64;
        // The gold reward rises to step 20 and falls from there.
        let gold = if step <= 20 { t } else { 40.0 - t };
        let stats = Stats::from_iter([
            ("grpo/score/mean", 0.1 * t),
            ("grpo/judge/gold", 0.02 * gold),
        ]);
        last = step;
        if watch.look("grpo", step, &stats).is_break() {
            break;
        }
    }
    let finding = watch.stopped_by().unwrap();
    assert_eq!(finding.kind, FindingKind::GoldDecline);
    assert_eq!(last, finding.step + 2);
    assert_eq!(watch.findings().len(), 1);
    let told = told.lock().unwrap();
    assert_eq!(*told, [finding.to_string()]);
    assert!(
        told[0].starts_with("grpo step 2") || told[0].starts_with("grpo step 3"),
        "{}",
        told[0]
    );
    let peak = finding.what.split("around step ").nth(1).unwrap();
    let peak: u64 = peak.split(',').next().unwrap().parse().unwrap();
    assert!((20..=26).contains(&peak), "{peak}");
}

#[test]
fn a_finding_that_flickers_is_one_and_one_that_returns_is_two() {
    let mut watch = HackingWatch::new(WatchConfig::default()).unwrap();
    let mut below = Vec::new();
    for step in 1..=130u64 {
        // To and fro about the threshold of 0.3, then well above it, then well below.
        let entropy = match step {
            1..=8 => 1.0,
            9..=60 => 0.3 + 0.02 * (step as f64).sin(),
            61..=100 => 0.8,
            _ => 0.1,
        };
        below.push(entropy);
        let stats = Stats::from_iter([("grpo/policy/entropy", entropy)]);
        assert!(watch.look("grpo", step, &stats).is_continue());
    }
    let under = |end: usize| below[end - 8..end].iter().sum::<f64>() / 8.0 < 0.3;
    let crossings = (17..=60)
        .filter(|&end| under(end) != under(end - 1))
        .count();
    assert!(crossings > 8, "{crossings}");
    let steps: Vec<u64> = watch.findings().iter().map(|f| f.step).collect();
    assert!(matches!(steps[..], [16..=30, 101..=130]), "{steps:?}");
}

#[test]
fn other_phases_and_phases_apart() {
    let mut watch = HackingWatch::new(WatchConfig::default()).unwrap();
    for step in 1..=STEPS {
        let stats = Stats::from_iter([
            ("ranking/score/mean", step as f64),
            ("ranking/length", 20.0 + step as f64),
        ]);
        let event = Event {
            step,
            total_steps: None,
            phase: "ranking",
            stats: &stats,
        };
        assert!(watch.observe(&event).unwrap().is_continue());
    }
    assert!(watch.findings().is_empty());
}

fn letters(ids: &[i64]) -> rlhf_ppo::core::Result<String> {
    Ok(ids.iter().map(|&id| char::from(b'a' + id as u8)).collect())
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..20).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

/// A judge that counts `c`s is hacked by answers that say nothing else.
#[test]
fn a_hacked_grpo_run_is_seen_and_the_watch_changes_nothing() {
    let trainer = || {
        let mut config = GrpoConfig::dr_grpo();
        config.generation.samples_per_prompt = 4;
        config.generation.max_new_tokens = 12;
        config.generation.stop_token_ids = vec![STOP];
        config.update.optimizer.lr = 0.05;
        let judge = reward_fn(|_, answer| answer.matches('c').count() as f64);
        GrpoTrainer::with_reference(config, Bigram::new(), Bigram::frozen(), judge)
            .unwrap()
            .with_detokenizer(letters)
    };
    let mut watch = HackingWatch::new(WatchConfig::default()).unwrap();
    let mut watched = trainer();
    let mut observers: Vec<Box<dyn Observer + '_>> =
        vec![Box::new(|event: &Event<'_>| watch.observe(event))];
    watched.train(&prompts(), 40, &mut observers).unwrap();
    drop(observers);
    let found: Vec<FindingKind> = watch.findings().iter().map(|f| f.kind).collect();
    assert!(found.contains(&FindingKind::Repetition), "{found:?}");
    assert!(found.contains(&FindingKind::LengthDrift), "{found:?}");
    let mut alone = trainer();
    alone.train(&prompts(), 40, &mut []).unwrap();
    assert_eq!(watched.policy().0, alone.policy().0);
}

#[test]
fn ppo_reports_what_the_rules_need() {
    let mut config = PpoConfig {
        batch_size: 16,
        kl_control: KlControl::ziegler(),
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    let judge = reward_fn(|_, answer| answer.len() as f64);
    let mut trainer = PpoTrainer::new(
        config,
        Bigram::new(),
        TokenValue::new(),
        Bigram::frozen(),
        judge,
    )
    .unwrap()
    .with_detokenizer(letters);
    let stats = trainer.step(&prompts()[..16]).unwrap();
    for name in [
        "score/mean",
        "score/std",
        "score/length_correlation",
        "kl",
        "kl_target",
        "length",
        "finished",
        "distinct_2",
        "distinct_2_across",
        "policy/entropy",
        "value/explained_variance",
    ] {
        assert!(stats.get(&format!("ppo/{name}")).is_some(), "{name}");
    }
    let mut watch = HackingWatch::new(WatchConfig::default()).unwrap();
    assert_eq!(watch.look("ppo", 1, &stats), ControlFlow::Continue(()));
}
