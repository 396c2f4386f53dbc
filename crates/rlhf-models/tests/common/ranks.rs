//! Ranks that are threads: a group without processes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rlhf_core::{Collective, Error, Reduction, Result};
use tch::{Kind, Tensor};

const LIMIT: Duration = Duration::from_secs(60);

type Inbox = (Sender<Tensor>, Mutex<Receiver<Tensor>>);

/// What the ranks of a group share.
struct Common {
    size: usize,
    /// What each rank has brought, and which meeting this is.
    meeting: Mutex<(Vec<Option<Tensor>>, u64)>,
    changed: Condvar,
    /// Of each rank, one for each other.
    inboxes: Vec<Vec<Inbox>>,
}

/// A rank of a group of threads.
pub struct ThreadRank {
    rank: usize,
    common: Arc<Common>,
    /// Bytes of all tensors that were all-reduced, and how often.
    pub reduced: AtomicU64,
    pub reductions: AtomicU64,
    /// Bytes of all tensors that were sent.
    sent: AtomicU64,
}

impl Common {
    fn new(size: usize) -> Arc<Self> {
        let inbox = || {
            let (sender, receiver) = channel();
            (sender, Mutex::new(receiver))
        };
        Arc::new(Self {
            size,
            meeting: Mutex::new(((0..size).map(|_| None).collect(), 0)),
            changed: Condvar::new(),
            inboxes: (0..size)
                .map(|_| (0..size).map(|_| inbox()).collect())
                .collect(),
        })
    }
}

fn late(rank: usize) -> Error {
    Error::model(format!("rank {rank} waited in vain"))
}

impl ThreadRank {
    fn new(rank: usize, common: &Arc<Common>) -> Arc<Self> {
        Arc::new(Self {
            rank,
            common: Arc::clone(common),
            reduced: AtomicU64::new(0),
            reductions: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        })
    }

    /// Bytes of all tensors that were sent to another rank.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// What all ranks bring, in their order.
    fn meet(&self, own: &Tensor) -> Result<Vec<Tensor>> {
        let common = &self.common;
        let copy = own.f_detach()?.f_empty_like()?;
        { copy.shallow_clone() }.f_copy_(own)?;
        let mut meeting = common.meeting.lock().unwrap();
        // Those of the meeting before are still leaving.
        while meeting.0[self.rank].is_some() {
            let (next, timeout) = common.changed.wait_timeout(meeting, LIMIT).unwrap();
            meeting = next;
            if timeout.timed_out() {
                return Err(late(self.rank));
            }
        }
        meeting.0[self.rank] = Some(copy);
        common.changed.notify_all();
        while meeting.0.iter().any(Option::is_none) {
            let (next, timeout) = common.changed.wait_timeout(meeting, LIMIT).unwrap();
            meeting = next;
            if timeout.timed_out() {
                return Err(late(self.rank));
            }
        }
        let all = meeting.0.iter().flatten().map(Tensor::shallow_clone);
        let all: Vec<Tensor> = all.collect();
        // The last to leave clears the table.
        meeting.1 += 1;
        if meeting.1.is_multiple_of(common.size as u64) {
            meeting.0.iter_mut().for_each(|brought| *brought = None);
            common.changed.notify_all();
        } else {
            let gone = meeting.1 / common.size as u64;
            while meeting.1 / common.size as u64 == gone {
                let (next, timeout) = common.changed.wait_timeout(meeting, LIMIT).unwrap();
                meeting = next;
                if timeout.timed_out() {
                    return Err(late(self.rank));
                }
            }
        }
        Ok(all)
    }
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.common.size
    }

    fn all_reduce(&self, tensor: &Tensor, reduction: Reduction) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        self.reduced.fetch_add(bytes as u64, Ordering::Relaxed);
        self.reductions.fetch_add(1, Ordering::Relaxed);
        let all = Tensor::f_stack(&self.meet(tensor)?, 0)?;
        let result = match reduction {
            Reduction::Sum => all.f_sum_dim_intlist([0i64].as_slice(), false, None::<Kind>)?,
            Reduction::Max => all.f_amax([0i64].as_slice(), false)?,
        };
        tensor.shallow_clone().f_copy_(&result)?;
        Ok(())
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        self.meet(tensor)
    }

    fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let all = self.meet(tensor)?;
        tensor.shallow_clone().f_copy_(&all[from])?;
        Ok(())
    }

    fn send(&self, tensor: &Tensor, to: usize) -> Result<()> {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        let copy = tensor.f_detach()?.f_empty_like()?;
        { copy.shallow_clone() }.f_copy_(tensor)?;
        let (sender, _) = &self.common.inboxes[to][self.rank];
        sender.send(copy).map_err(|_| late(self.rank))
    }

    fn receive(&self, tensor: &Tensor, from: usize) -> Result<()> {
        let (_, receiver) = &self.common.inboxes[self.rank][from];
        let receiver = receiver.lock().unwrap();
        let sent = receiver.recv_timeout(LIMIT).map_err(|_| late(self.rank))?;
        assert_eq!(sent.size(), tensor.size());
        tensor.shallow_clone().f_copy_(&sent)?;
        Ok(())
    }
}

/// Runs `f` on so many ranks at once; what each returned, in their order.
pub fn on_ranks<T: Send>(size: usize, f: impl Fn(Arc<ThreadRank>) -> T + Sync) -> Vec<T> {
    on_mesh([1, size], |[_, rank]| f(rank))
}

/// The same on the ranks of a mesh; each gets its rank among those of its column and of its row.
pub fn on_mesh<T: Send>(
    [rows, columns]: [usize; 2],
    f: impl Fn([Arc<ThreadRank>; 2]) -> T + Sync,
) -> Vec<T> {
    let of_rows: Vec<Arc<Common>> = (0..rows).map(|_| Common::new(columns)).collect();
    let of_columns: Vec<Arc<Common>> = (0..columns).map(|_| Common::new(rows)).collect();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (row, of_row) in of_rows.iter().enumerate() {
            for (column, of_column) in of_columns.iter().enumerate() {
                let ranks = [
                    ThreadRank::new(row, of_column),
                    ThreadRank::new(column, of_row),
                ];
                let f = &f;
                threads.push(scope.spawn(move || f(ranks)));
            }
        }
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}
