//! Tensor files: every kind, byte for byte, atomic, strict.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use rlhf_scale::{Error, TensorProblem, io};
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 10] = [
    Kind::Bool,
    Kind::Uint8,
    Kind::Int8,
    Kind::Int16,
    Kind::Int,
    Kind::Int64,
    Kind::Half,
    Kind::BFloat16,
    Kind::Float,
    Kind::Double,
];

fn tensors() -> Vec<(String, Tensor)> {
    let values = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]) - 2.0;
    let mut tensors: Vec<_> = KINDS
        .into_iter()
        .map(|kind| (format!("of {kind:?}"), values.abs().to_kind(kind)))
        .collect();
    tensors.push(("scalar".into(), Tensor::from(3.5f64)));
    tensors.push((
        "empty".into(),
        Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)),
    ));
    tensors.push(("transposed".into(), values.tr()));
    tensors.push(("trained".into(), values.copy().set_requires_grad(true)));
    tensors.push(("nan".into(), Tensor::from_slice(&[f32::NAN, -0.0])));
    tensors
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn every_kind_survives_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let mut tensors = tensors();
    io::save_tensors(&path, &tensors).unwrap();
    assert_eq!(
        names_in(dir.path()),
        ["t.safetensors"],
        "no temporary file is left"
    );
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let read = io::read_tensors(&path).unwrap();
    assert_eq!(read.len(), tensors.len());
    for ((name, tensor), (read_name, read)) in tensors.iter().zip(&read) {
        assert_eq!(
            (name, tensor.kind(), tensor.size()),
            (read_name, read.kind(), read.size())
        );
        assert_eq!(bytes(tensor), bytes(read), "{name}");
    }
    let targets: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.zeros_like()))
        .collect();
    io::load_tensors_into(&path, &targets).unwrap();
    for ((name, tensor), (_, target)) in tensors.iter().zip(&targets) {
        assert_eq!(bytes(tensor), bytes(target), "{name}");
    }
}

#[test]
fn other_readers_understand_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    io::save_tensors(&path, &tensors()).unwrap();
    let file = std::fs::read(&path).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(parsed.len(), tensors().len());
    for (name, view) in parsed.iter() {
        let expected = &tensors().into_iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(view.data(), bytes(expected), "{name}");
        let offset = view.data().as_ptr() as usize - file.as_ptr() as usize;
        assert!(
            offset.is_multiple_of(expected.kind().elt_size_in_bytes()),
            "{name} is misaligned"
        );
    }
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn the_same_tensors_make_the_same_bytes_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut reversed = tensors();
    reversed.reverse();
    io::save_tensors(&a, &tensors()).unwrap();
    io::save_tensors(&b, &reversed).unwrap();
    assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
}

#[test]
fn every_mismatch_is_reported_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let of = |name: &str, shape: &[i64], kind| {
        (name.to_string(), Tensor::ones(shape, (kind, Device::Cpu)))
    };
    let stored = [
        of("fine", &[2], Kind::Float),
        of("shape", &[2, 3], Kind::Float),
        of("kind", &[2], Kind::BFloat16),
        of("extra", &[1], Kind::Float),
    ];
    io::save_tensors(&path, &stored).unwrap();
    let targets = [
        of("fine", &[2], Kind::Float),
        of("shape", &[3, 2], Kind::Float),
        of("kind", &[2], Kind::Float),
        of("missing", &[1], Kind::Float),
    ];
    let _ = targets[0].1.shallow_clone().zero_();
    let error = io::load_tensors_into(&path, &targets).unwrap_err();
    let message = error.to_string();
    let Error::TensorFile { problems, .. } = error else {
        panic!("{message}")
    };
    assert_eq!(
        problems,
        [
            TensorProblem::Shape {
                name: "shape".into(),
                found: vec![2, 3],
                expected: vec![3, 2]
            },
            TensorProblem::Kind {
                name: "kind".into(),
                found: Kind::BFloat16,
                expected: Kind::Float
            },
            TensorProblem::Missing {
                name: "missing".into()
            },
            TensorProblem::Unexpected {
                name: "extra".into()
            },
        ]
    );
    for name in ["shape", "kind", "missing", "extra"] {
        assert!(message.contains(&format!("\n  {name}: ")), "{message}");
    }
    assert_eq!(targets[0].1.double_value(&[0]), 0.0);
}

#[test]
fn damaged_files_are_typed_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    io::save_tensors(&path, &tensors()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut longer = whole.clone();
    longer.push(0);
    let mut garbled = whole.clone();
    garbled[9] = b'!';
    let cuts = [0, 7, 8, 40, whole.len() - 1].map(|cut| whole[..cut].to_vec());
    for damaged in cuts.into_iter().chain([huge, longer, garbled]) {
        std::fs::write(&path, &damaged).unwrap();
        let error = io::read_tensors(&path).unwrap_err();
        assert!(
            matches!(error, Error::Core(rlhf_scale::core::Error::Corrupt { .. })),
            "{} bytes: {error}",
            damaged.len()
        );
    }
    let error = io::read_tensors(&dir.path().join("absent")).unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
}

#[test]
fn a_write_that_fails_leaves_the_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    io::save_tensors(&path, &tensors()).unwrap();
    let before = std::fs::read(&path).unwrap();
    let ones = || Tensor::ones([2], (Kind::Float, Device::Cpu));
    let twice = [("x".to_string(), ones()), ("x".to_string(), ones())];
    let error = io::save_tensors(&path, &twice).unwrap_err();
    assert!(matches!(error, Error::DuplicateName { .. }));
    let complex = [("z".to_string(), ones().to_kind(Kind::ComplexDouble))];
    let error = io::save_tensors(&path, &complex).unwrap_err();
    assert!(matches!(error, Error::UnsupportedKind { .. }));
    // A sparse tensor has no flat bytes; that shows only while the file is being written.
    let sparse = [
        ("a".to_string(), ones()),
        ("b".to_string(), ones().to_sparse_sparse_dim(1)),
    ];
    assert!(io::save_tensors(&path, &sparse).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(names_in(dir.path()), ["t.safetensors"]);
    assert!(io::save_tensors(Path::new("no/such/folder/t"), &tensors()).is_err());
}
