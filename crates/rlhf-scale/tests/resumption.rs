//! A saved updater goes on as if it had not stopped, and refuses states that are not its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;

use rlhf_scale::{
    EmaConfig, Error, LossScale, ParamGroup, Precision, Schedule, TensorProblem, UpdateConfig,
    UpdateStats, Updater, io,
};
use support::{CPU, Net, bytes, config, train};
use tch::{Kind, Tensor};

/// Twelve updates at a stretch, and seven with five more after a save and a load: all the same,
/// bit for bit. Returns the stats.
fn resumed_equals_straight(kind: Kind, config: &UpdateConfig) -> Vec<UpdateStats> {
    let dir = tempfile::tempdir().unwrap();
    let straight = Net::new(kind);
    let mut of_straight = Updater::new(straight.aliases(), config).unwrap();
    let straight_stats: Vec<_> = (0..12)
        .map(|_| train(&straight, &mut of_straight, 2))
        .collect();

    let first = Net::new(kind);
    let mut of_first = Updater::new(first.aliases(), config).unwrap();
    for _ in 0..7 {
        train(&first, &mut of_first, 2);
    }
    of_first.save(&dir.path().join("new/folder")).unwrap();

    let second = Net::new(kind);
    let mut of_second = Updater::new(second.aliases(), config).unwrap();
    train(&second, &mut of_second, 1); // a state that load has to overwrite
    of_second.load(&dir.path().join("new/folder")).unwrap();
    assert_eq!(second.bytes(), first.bytes());
    let stats: Vec<_> = (0..5).map(|_| train(&second, &mut of_second, 2)).collect();
    assert_eq!(stats, straight_stats[7..]);
    assert_eq!(second.bytes(), straight.bytes());
    assert_eq!(of_second.loss_scaler(), of_straight.loss_scaler());
    assert_eq!(averages(&of_second), averages(&of_straight));
    straight_stats
}

fn averages(updater: &Updater) -> Vec<Vec<u8>> {
    let ema = updater.ema().into_iter().flat_map(|ema| ema.averages());
    ema.map(|(_, average)| bytes(average)).collect()
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    resumed_equals_straight(Kind::Float, &config());
}

#[test]
fn a_resumed_bf16_run_keeps_its_masters() {
    resumed_equals_straight(Kind::BFloat16, &config());
}

#[test]
fn a_resumed_f16_run_keeps_scale_and_averages() {
    let mut config = config();
    config.schedule = Schedule::constant();
    config.loss_scale = Some(LossScale {
        initial: 2f64.powi(21),
        growth_factor: 3.3,
        backoff_factor: 0.3,
        growth_interval: 6,
        ..LossScale::default()
    });
    config.ema = Some(EmaConfig {
        start_step: 3,
        ..EmaConfig::default()
    });
    let stats = resumed_equals_straight(Kind::Half, &config);
    let scales: Vec<f64> = stats.iter().filter_map(|s| s.loss_scale).collect();
    assert!(stats[0].skipped && !stats[6].skipped, "{scales:?}");
    let grew = scales[7..].windows(2).any(|pair| pair[1] > pair[0]);
    assert!(grew, "the saved growth tracker must matter: {scales:?}");
}

#[test]
fn a_damaged_loss_scale_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Half);
    let config = config().for_precision(Precision::F16);
    let mut updater = Updater::new(net.aliases(), &config).unwrap();
    updater.save(dir.path()).unwrap();
    let path = dir.path().join("updater.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let damaged = text.replace("\"scale\": 65536.0", "\"scale\": -1.0");
    assert_ne!(damaged, text);
    std::fs::write(&path, damaged).unwrap();
    let error = updater.load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("loss_scaler"), "{error}");
}

#[test]
fn a_state_from_before_loss_scaling_still_loads() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    updater.save(dir.path()).unwrap();
    let path = dir.path().join("updater.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
    let saved = state["config"].as_object_mut().unwrap();
    saved.remove("loss_scale").unwrap();
    saved.remove("ema").unwrap();
    std::fs::write(&path, state.to_string()).unwrap();
    updater.load(dir.path()).unwrap();
}

#[test]
fn another_configuration_is_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    train(&net, &mut updater, 1);
    updater.save(dir.path()).unwrap();
    let field_of = |config: UpdateConfig| {
        let mut other = Updater::new(net.aliases(), &config).unwrap();
        match other.load(dir.path()).unwrap_err() {
            Error::ConfigMismatch { field, .. } => field,
            error => panic!("{error}"),
        }
    };
    let mut changed = config();
    changed.optimizer.beta2 = 0.95;
    assert_eq!(field_of(changed), "optimizer.beta2");
    let mut changed = config();
    changed.schedule = Schedule::cosine(2, 10);
    assert_eq!(field_of(changed), "schedule.kind");
    let mut changed = config();
    changed.max_grad_norm = None;
    assert_eq!(field_of(changed), "max_grad_norm");
    let changed = config().for_precision(Precision::F16);
    assert_eq!(field_of(changed), "loss_scale");
    let mut changed = config();
    changed.optimizer.groups = vec![ParamGroup {
        params: vec!["*".into()],
        ..ParamGroup::default()
    }];
    assert_eq!(field_of(changed), "optimizer.groups");
}

#[test]
fn other_parameters_are_refused_all_at_once_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    train(&net, &mut updater, 1);
    updater.save(dir.path()).unwrap();

    let other = Net::new(Kind::Float);
    let mut params = other.aliases();
    params[0].0 = "renamed".into();
    params[1].1 = Tensor::zeros([5], (Kind::Float, CPU)).set_requires_grad(true);
    let mut of_other = Updater::new(params, &config()).unwrap();
    let before = other.bytes();
    match of_other.load(dir.path()).unwrap_err() {
        Error::TensorFile { path, problems } => {
            assert!(path.ends_with("parameters.safetensors"));
            assert_eq!(problems.len(), 3, "{problems:?}");
            assert!(problems.contains(&TensorProblem::Missing {
                name: "renamed".into()
            }));
            assert!(problems.contains(&TensorProblem::Unexpected {
                name: "a.weight".into()
            }));
        }
        error => panic!("{error}"),
    }
    assert_eq!(other.bytes(), before);
}

#[test]
fn a_damaged_optimizer_file_leaves_the_parameters_alone() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    train(&net, &mut updater, 1);
    updater.save(dir.path()).unwrap();
    for _ in 0..2 {
        train(&net, &mut updater, 1);
    }
    let path = dir.path().join("optimizer.safetensors");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 4]).unwrap();
    let before = net.bytes();
    let error = updater.load(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("optimizer.safetensors"),
        "{error}"
    );
    assert_eq!((net.bytes(), updater.step()), (before, 3));
    std::fs::write(&path, &whole).unwrap();
    updater.load(dir.path()).unwrap();
    assert_eq!(updater.step(), 1);
    assert!(updater.load(Path::new("no/such/folder")).is_err());
    assert_eq!(io::read_tensors(&path).unwrap().len(), 9);
}
