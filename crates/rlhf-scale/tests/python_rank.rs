//! A Python rank of `torch.distributed` in a group with ranks of ours. Skipped where there is no Python
//! with torch: `RLHF_PYTHON` names one, else it is `python3`.
#![cfg(feature = "distributed")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // ranks talk to the test

use std::process::{Command, Stdio};
use std::time::Duration;

use rlhf_scale::distributed::{GroupOptions, ProcessGroup, ReduceOp, Rendezvous, StoreHost};
use tch::{Device, Kind, Tensor};

/// Rank 1 of 2, with the same operations as the test.
const RANK: &str = r#"
import datetime, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
assert (dist.get_rank(), dist.get_world_size()) == (1, 2)
for dtype in (torch.float32, torch.bfloat16, torch.int64):
    own = torch.arange(4).to(dtype) + 1
    dist.all_reduce(own)
    assert own.tolist() == [1, 3, 5, 7], own
gathered = [torch.zeros(2) for _ in range(2)]
dist.all_gather(gathered, torch.full((2,), 5.0))
assert [t.tolist() for t in gathered] == [[4, 4], [5, 5]], gathered
theirs = torch.zeros(3)
dist.broadcast(theirs, 0)
assert theirs.tolist() == [7, 7, 7], theirs
dist.recv(theirs, 0, tag=3)
assert theirs.tolist() == [1, 2, 3], theirs
dist.send(theirs * 2, 0, tag=4)

# The gradient of a loss that is half theirs and half ours.
torch.manual_seed(0)
weight = torch.full((3, 1), 0.5, requires_grad=True)
loss = (torch.tensor([[1.0, 2.0, 3.0]]) @ weight).square().sum() / 2
loss.backward()
dist.all_reduce(weight.grad)
assert weight.grad.flatten().tolist() == [6.0, 7.5, 9.0], weight.grad
dist.destroy_process_group()
"#;

fn python() -> Option<String> {
    let python = std::env::var("RLHF_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut command = Command::new(&python);
    command.args([
        "-c",
        "import torch.distributed as d; assert d.is_gloo_available()",
    ]);
    let command = command.env_remove("LD_LIBRARY_PATH");
    let found = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.is_ok_and(|status| status.success()).then_some(python)
}

#[test]
fn a_python_rank_agrees() {
    let Some(python) = python() else {
        eprintln!("skipped: no Python with torch; RLHF_PYTHON names one");
        return;
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let child = Command::new(python)
        .args(["-c", RANK])
        .env_remove("LD_LIBRARY_PATH") // it brings a libtorch of its own
        .env("RANK", "1")
        .env("WORLD_SIZE", "2")
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let place = Rendezvous {
        rank: 0,
        size: 2,
        local_rank: 0,
        host: "127.0.0.1".into(),
        port,
        store: StoreHost::FirstRank,
    };
    let options = GroupOptions {
        limit: Duration::from_secs(60),
        ..GroupOptions::default()
    };
    let outcome =
        std::panic::catch_unwind(|| talk(&ProcessGroup::connect(place, &options).unwrap()));
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(outcome.is_ok());
}

fn talk(group: &ProcessGroup) {
    let numbers = |t: &Tensor| Vec::<f64>::try_from(t.to_kind(Kind::Double).view(-1)).unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Int64] {
        let own = Tensor::arange(4, (kind, Device::Cpu));
        group.all_reduce(&own, ReduceOp::Sum).unwrap();
        assert_eq!(numbers(&own), [1., 3., 5., 7.], "{kind:?}");
    }
    let all = group.all_gather(&Tensor::from_slice(&[4f32, 4.0])).unwrap();
    assert_eq!(numbers(&all), [4., 4., 5., 5.]);
    group.broadcast(&Tensor::from_slice(&[7f32; 3]), 0).unwrap();
    let tensor = Tensor::from_slice(&[1f32, 2.0, 3.0]);
    group.send(&tensor, 1, 3).unwrap();
    group.recv(&tensor, 1, 4).unwrap();
    assert_eq!(numbers(&tensor), [2., 4., 6.]);
    let weight = Tensor::full([3, 1], 0.5, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let row = Tensor::from_slice2(&[[2f32, 1.0, 0.0]]);
    (row.matmul(&weight).square().sum(Kind::Float) * 0.5).backward();
    let grad = weight.grad();
    group.all_reduce(&grad, ReduceOp::Sum).unwrap();
    // [1, 2, 3] · 3 of theirs and [2, 1, 0] · 1.5 of ours.
    assert_eq!(numbers(&grad), [6.0, 7.5, 9.0]);
}
