//! c10d's gradient reducer.

use std::ffi::c_void;
use std::ptr::null_mut;

use tch::Tensor;

use super::c10d::Group;
use super::{Message, Raw, check, raw_list};
use crate::Result;

type Opaque = *mut c_void;

unsafe extern "C" {
    fn rlhf_reducer_new(
        group: Opaque,
        params: *const Raw,
        count: usize,
        bucket_bytes: i64,
        result: *mut Opaque,
    ) -> Message;
    fn rlhf_reducer_free(reducer: Opaque);
    fn rlhf_reducer_arm(reducer: Opaque) -> Message;
    fn rlhf_reducer_complete(reducer: Opaque) -> Message;
    fn rlhf_reducer_trace(reducer: Opaque, numbers: *mut i64, most: usize) -> usize;
    fn rlhf_reducer_now() -> i64;
}

/// Sums gradients over a group while backward goes on.
#[derive(Debug)]
pub(crate) struct Reducer(Opaque);

// SAFETY: libtorch's engine calls it from its threads; the reducer locks its state.
unsafe impl Send for Reducer {}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: ours, once.
        unsafe { rlhf_reducer_free(self.0) }
    }
}

/// A bucket's sum: bytes, start and end in nanoseconds of the clock of [`now`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub(crate) bytes: i64,
    pub(crate) started: i64,
    pub(crate) ended: i64,
}

impl Reducer {
    /// Of leaves that require gradients, the same on all ranks, which is checked.
    pub(crate) fn new(group: &Group, params: &[&Tensor], bucket_bytes: usize) -> Result<Self> {
        let params = raw_list(params);
        let bytes = i64::try_from(bucket_bytes).unwrap_or(i64::MAX);
        let mut result = null_mut();
        // SAFETY: live objects; C++ takes its own references.
        check(unsafe {
            rlhf_reducer_new(
                group.opaque(),
                params.as_ptr(),
                params.len(),
                bytes,
                &mut result,
            )
        })?;
        Ok(Self(result))
    }

    /// Lets the next backward reduce.
    pub(crate) fn arm(&mut self) -> Result<()> {
        // SAFETY: a live reducer.
        check(unsafe { rlhf_reducer_arm(self.0) })
    }

    /// Waits for the sums, zeros for what backward did not reach included.
    pub(crate) fn complete(&mut self) -> Result<()> {
        // SAFETY: a live reducer.
        check(unsafe { rlhf_reducer_complete(self.0) })
    }

    /// What the last reduction did, in the order in which buckets became ready.
    pub(crate) fn trace(&self) -> Vec<Event> {
        // SAFETY: a live reducer; nothing is written where no room is.
        let count = unsafe { rlhf_reducer_trace(self.0, null_mut(), 0) };
        let mut numbers = vec![0i64; 3 * count];
        // SAFETY: room for three numbers of each of `count` events.
        unsafe { rlhf_reducer_trace(self.0, numbers.as_mut_ptr(), count) };
        let event = |n: &[i64]| Event {
            bytes: n[0],
            started: n[1],
            ended: n[2],
        };
        numbers.chunks_exact(3).map(event).collect()
    }
}

/// Nanoseconds of a clock that never goes back.
pub(crate) fn now() -> i64 {
    // SAFETY: no arguments.
    unsafe { rlhf_reducer_now() }
}
