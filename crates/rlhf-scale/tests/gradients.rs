//! Gradients set, cleared and propagated, and tensors over foreign memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rlhf_scale::{
    Error, Norm, backward, clear_grads, clip_grad_norm, clip_grad_norm_of, set_grad,
    tensor_from_owner,
};
use tch::{Device, Kind, Tensor};

fn leaf(values: &[f32]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor).unwrap()
}

#[test]
fn backward_uses_the_output_gradients_of_every_output() {
    let x = leaf(&[1.0, 2.0, 3.0]);
    let outputs = [x.square(), &x * 10.0];
    let grads = [
        Tensor::from_slice(&[1f32, 0.5, -1.0]),
        Tensor::from_slice(&[0f32, 1.0, 2.0]),
    ];
    backward(&outputs, &grads).unwrap();
    // 2x * g0 + 10 * g1
    assert_eq!(floats(&x.grad()), [2.0, 12.0, 14.0]);
    let y = x.square();
    backward(&[y], &[Tensor::from_slice(&[1f32, 1.0, 1.0])]).unwrap();
    assert_eq!(floats(&x.grad()), [4.0, 16.0, 20.0], "gradients accumulate");
}

#[test]
fn backward_refuses_what_does_not_correspond() {
    let x = leaf(&[1.0, 2.0]);
    let y = x.square();
    let error = backward(&[y.shallow_clone()], &[]).unwrap_err();
    assert!(matches!(
        error,
        Error::GradOutputCount {
            outputs: 1,
            grad_outputs: 0
        }
    ));
    let wrong = [Tensor::ones([3], (Kind::Float, Device::Cpu))];
    let error = backward(&[y.shallow_clone()], &wrong).unwrap_err();
    assert!(matches!(error, Error::GradMismatch { .. }), "{error}");
    let ones = || [Tensor::ones([2], (Kind::Float, Device::Cpu))];
    backward(&[y.shallow_clone()], &ones()).unwrap();
    let error = backward(&[y], &ones()).unwrap_err().to_string();
    assert!(
        error.contains("second time") && !error.contains("frame #"),
        "{error}"
    );
}

#[test]
fn gradients_are_set_and_cleared() {
    let x = leaf(&[1.0, 2.0]);
    let grad = Tensor::from_slice(&[3f32, 4.0]);
    set_grad(&x, Some(&grad)).unwrap();
    assert_eq!(floats(&x.grad()), [3.0, 4.0]);
    assert_eq!(x.grad().data_ptr(), grad.data_ptr(), "no copy");
    set_grad(&x, None).unwrap();
    assert!(!x.grad().defined());
    set_grad(&x, Some(&grad)).unwrap();
    clear_grads(&[x.shallow_clone(), leaf(&[0.0])]).unwrap();
    assert!(!x.grad().defined());
    let error = set_grad(&x, Some(&grad.to_kind(Kind::Double))).unwrap_err();
    assert!(matches!(error, Error::GradMismatch { .. }));
    let error = set_grad(&x, Some(&grad.view([1, 2]))).unwrap_err();
    assert!(matches!(error, Error::GradMismatch { .. }));
}

#[test]
fn clipping_skips_what_has_no_gradient_and_leaves_short_ones_alone() {
    let (x, idle) = (leaf(&[0.0, 0.0]), leaf(&[7.0]));
    assert_eq!(
        clip_grad_norm(&[x.shallow_clone(), idle.shallow_clone()], 1.0).unwrap(),
        0.0
    );
    let params = [x.shallow_clone(), idle];
    set_grad(&x, Some(&Tensor::from_slice(&[3f32, -4.0]))).unwrap();
    assert_eq!(clip_grad_norm(&params, 6.0).unwrap(), 5.0);
    assert_eq!(floats(&x.grad()), [3.0, -4.0]);
    assert_eq!(clip_grad_norm_of(&params, 6.0, Norm::Max).unwrap(), 4.0);
    assert_eq!(clip_grad_norm(&params, 1.0).unwrap(), 5.0);
    assert!((clip_grad_norm(&params, 1.0).unwrap() - 1.0).abs() < 1e-6);
}

#[test]
fn the_norm_of_bf16_gradients_is_computed_in_f32() {
    let x = Tensor::zeros([10_000], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    set_grad(&x, Some(&x.detach().ones_like())).unwrap();
    assert_eq!(clip_grad_norm(&[x], 1e9).unwrap(), 100.0);
}

#[test]
fn a_norm_that_is_not_finite_scales_nothing() {
    let x = leaf(&[0.0, 0.0]);
    set_grad(&x, Some(&Tensor::from_slice(&[f32::INFINITY, 1.0]))).unwrap();
    assert_eq!(
        clip_grad_norm(&[x.shallow_clone()], 1.0).unwrap(),
        f64::INFINITY
    );
    assert_eq!(floats(&x.grad()), [f32::INFINITY, 1.0]);
}

/// Memory that counts its drops.
struct Owner(Vec<u8>, Arc<AtomicUsize>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

fn owned(bytes: Vec<u8>) -> (Owner, Arc<AtomicUsize>) {
    let drops = Arc::new(AtomicUsize::new(0));
    (Owner(bytes, drops.clone()), drops)
}

#[test]
fn the_owner_lives_as_long_as_the_last_view() {
    let bytes: Vec<u8> = [1.5f32, -2.0, 3.0, 0.25]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let (owner, drops) = owned(bytes);
    let memory = owner.0.as_ptr() as usize;
    let tensor = tensor_from_owner(owner, |owner| &mut owner.0, &[2, 2], Kind::Float).unwrap();
    assert_eq!(tensor.data_ptr() as usize, memory, "no copy");
    let view = tensor.get(1);
    drop(tensor);
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    assert_eq!(floats(&view), [3.0, 0.25]);
    std::thread::spawn(move || drop(view)).join().unwrap();
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

#[test]
fn a_part_of_a_byte_tensor_can_be_read_as_another_kind() {
    let mut bytes = vec![0xffu8; 4];
    bytes.extend(1f32.to_le_bytes());
    let whole = tensor_from_owner(bytes, |bytes| bytes, &[8], Kind::Uint8).unwrap();
    let mut part = whole.narrow(0, 4, 4).view_dtype(Kind::BFloat16);
    assert_eq!(floats(&part.to_kind(Kind::Float)), [0.0, 1.0]);
    let _ = part.fill_(0.0);
    assert_eq!(whole.int64_value(&[7]), 0, "views write through");
}

#[test]
fn unsuitable_memory_is_refused_and_its_owner_dropped() {
    for shape in [&[3, 2][..], &[5], &[-4], &[i64::MAX, 4]] {
        let (owner, drops) = owned(vec![0; 16]);
        let error = tensor_from_owner(owner, |owner| &mut owner.0, shape, Kind::Float).unwrap_err();
        assert!(matches!(error, Error::Memory { bytes: 16, .. }), "{error}");
        assert_eq!(drops.load(Ordering::SeqCst), 1);
    }
    let (owner, _) = owned(vec![0; 17]);
    let error = tensor_from_owner(owner, |owner| &mut owner.0[1..], &[4], Kind::Float).unwrap_err();
    assert!(error.to_string().contains("misaligned"), "{error}");
}

#[test]
fn empty_memory_makes_an_empty_tensor() {
    let (owner, drops) = owned(Vec::new());
    let tensor = tensor_from_owner(owner, |owner| &mut owner.0, &[0, 3], Kind::Uint8).unwrap();
    assert_eq!((tensor.size(), tensor.numel()), (vec![0, 3], 0));
    drop(tensor);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

#[test]
fn an_owner_that_panics_in_drop_does_not_bring_the_process_down() {
    struct Bomb(Vec<u8>);
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("in drop");
        }
    }
    let tensor = tensor_from_owner(Bomb(vec![1]), |bomb| &mut bomb.0, &[1], Kind::Uint8).unwrap();
    drop(tensor);
}
