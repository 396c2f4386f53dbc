//! libtorch's process groups.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::time::Duration;

use tch::Tensor;

use super::{Message, Raw, check, raw};
use crate::Result;

/// An opaque object of the shim.
type Opaque = *mut c_void;

unsafe extern "C" {
    fn rlhf_store_new(
        host: *const c_char,
        port: u16,
        prefix: *const c_char,
        is_server: bool,
        timeout_ms: i64,
        result: *mut Opaque,
    ) -> Message;
    fn rlhf_store_connect_again(store: Opaque, result: *mut Opaque) -> Message;
    fn rlhf_store_set(store: Opaque, key: *const c_char, data: *const u8, bytes: usize) -> Message;
    fn rlhf_store_get(store: Opaque, key: *const c_char, result: *mut *mut c_char) -> Message;
    fn rlhf_store_free(store: Opaque);
    fn rlhf_group_new(
        store: Opaque,
        name: *const c_char,
        nccl: bool,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        result: *mut Opaque,
    ) -> Message;
    fn rlhf_group_free(group: Opaque);
    fn rlhf_all_reduce(group: Opaque, tensor: Raw, op: c_int, result: *mut Opaque) -> Message;
    fn rlhf_broadcast(group: Opaque, tensor: Raw, root: c_int, result: *mut Opaque) -> Message;
    fn rlhf_all_gather(group: Opaque, output: Raw, input: Raw, result: *mut Opaque) -> Message;
    fn rlhf_reduce_scatter(
        group: Opaque,
        output: Raw,
        input: Raw,
        op: c_int,
        result: *mut Opaque,
    ) -> Message;
    fn rlhf_all_to_all(
        group: Opaque,
        output: Raw,
        input: Raw,
        output_rows: *const i64,
        input_rows: *const i64,
        result: *mut Opaque,
    ) -> Message;
    fn rlhf_send(group: Opaque, tensor: Raw, to: c_int, tag: c_int, result: *mut Opaque)
    -> Message;
    fn rlhf_recv(
        group: Opaque,
        tensor: Raw,
        from: c_int,
        tag: c_int,
        result: *mut Opaque,
    ) -> Message;
    fn rlhf_work_wait(work: Opaque, slice_ms: i64, done: *mut bool) -> Message;
    fn rlhf_work_wait_whole(work: Opaque) -> Message;
    fn rlhf_work_free(work: Opaque);
}

/// A connection to the key-value store that processes meet at.
#[derive(Debug)]
pub(crate) struct Store(Opaque);

// SAFETY: TCPStore locks its connection around each operation.
unsafe impl Send for Store {}
// SAFETY: the same.
unsafe impl Sync for Store {}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: ours, once.
        unsafe { rlhf_store_free(self.0) }
    }
}

impl Store {
    /// Connects, and serves the store where `is_server`. Waits at most `limit`. All keys get the
    /// prefix, if there is one.
    pub(crate) fn connect(
        host: &str,
        port: u16,
        prefix: &str,
        is_server: bool,
        limit: Duration,
    ) -> Result<Self> {
        let (host, prefix) = (text(host), text(prefix));
        let mut result = null_mut();
        // SAFETY: the strings live through the call; `result` is set where no error is returned.
        check(unsafe {
            rlhf_store_new(
                host.as_ptr(),
                port,
                prefix.as_ptr(),
                is_server,
                millis(limit),
                &mut result,
            )
        })?;
        Ok(Self(result))
    }

    /// Another connection to the same store.
    pub(crate) fn again(&self) -> Result<Self> {
        let mut result = null_mut();
        // SAFETY: a live store.
        check(unsafe { rlhf_store_connect_again(self.0, &mut result) })?;
        Ok(Self(result))
    }

    pub(crate) fn set(&self, key: &str, value: &str) -> Result<()> {
        let key = text(key);
        // SAFETY: a live store; both strings live through the call.
        check(unsafe { rlhf_store_set(self.0, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// The value of `key`, without waiting for one.
    pub(crate) fn get(&self, key: &str) -> Result<Option<String>> {
        let key = text(key);
        let mut result = null_mut();
        // SAFETY: a live store; the result is null or a C string that is ours to free.
        unsafe {
            check(rlhf_store_get(self.0, key.as_ptr(), &mut result))?;
            if result.is_null() {
                return Ok(None);
            }
            let value = CStr::from_ptr(result).to_string_lossy().into_owned();
            libc::free(result.cast());
            Ok(Some(value))
        }
    }
}

/// A process group with one backend.
#[derive(Debug)]
pub(crate) struct Group(Opaque);

// SAFETY: c10d's backends lock their queues; PyTorch calls them from several threads too.
unsafe impl Send for Group {}
// SAFETY: the same.
unsafe impl Sync for Group {}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: ours, once.
        unsafe { rlhf_group_free(self.0) }
    }
}

/// An operation under way. It keeps its tensors alive.
#[derive(Debug)]
pub(crate) struct Work(Opaque);

// SAFETY: c10d's works lock their state.
unsafe impl Send for Work {}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: ours, once.
        unsafe { rlhf_work_free(self.0) }
    }
}

impl Work {
    /// Waits for `slice`; whether the operation has ended.
    pub(crate) fn wait(&self, slice: Duration) -> Result<bool> {
        let mut done = false;
        // SAFETY: a live work.
        check(unsafe { rlhf_work_wait(self.0, millis(slice), &mut done) })?;
        Ok(done)
    }

    /// Waits as long as the group's own limit lasts.
    pub(crate) fn wait_whole(&self) -> Result<()> {
        // SAFETY: a live work.
        check(unsafe { rlhf_work_wait_whole(self.0) })
    }
}

/// How numbers of several ranks become one, in the shim's order.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Sum,
    Product,
    Min,
    Max,
}

impl Group {
    /// Meets the others at `store`. The caller has checked that `rank < size`.
    pub(crate) fn connect(
        store: &Store,
        name: &str,
        nccl: bool,
        rank: usize,
        size: usize,
        limit: Duration,
    ) -> Result<Self> {
        let name = text(name);
        let mut result = null_mut();
        // SAFETY: a live store; the string lives through the call.
        check(unsafe {
            rlhf_group_new(
                store.0,
                name.as_ptr(),
                nccl,
                number(rank),
                number(size),
                millis(limit),
                &mut result,
            )
        })?;
        Ok(Self(result))
    }

    /// The shim's object, for the reducer.
    pub(super) fn opaque(&self) -> Opaque {
        self.0
    }

    pub(crate) fn all_reduce(&self, tensor: &Tensor, op: Op) -> Result<Work> {
        // SAFETY: live objects; the work keeps the tensor.
        work(|result| unsafe { rlhf_all_reduce(self.0, raw(tensor), op as c_int, result) })
    }

    pub(crate) fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work> {
        // SAFETY: as above.
        work(|result| unsafe { rlhf_broadcast(self.0, raw(tensor), number(root), result) })
    }

    pub(crate) fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work> {
        // SAFETY: as above.
        work(|result| unsafe { rlhf_all_gather(self.0, raw(output), raw(input), result) })
    }

    pub(crate) fn reduce_scatter(&self, output: &Tensor, input: &Tensor, op: Op) -> Result<Work> {
        // SAFETY: as above.
        work(|result| unsafe {
            rlhf_reduce_scatter(self.0, raw(output), raw(input), op as c_int, result)
        })
    }

    /// Each list has one number a rank, which the caller has checked.
    pub(crate) fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_rows: &[i64],
        input_rows: &[i64],
    ) -> Result<Work> {
        let (outputs, inputs) = (output_rows.as_ptr(), input_rows.as_ptr());
        // SAFETY: as above, and the lists are as long as the group is large.
        work(|result| unsafe {
            rlhf_all_to_all(self.0, raw(output), raw(input), outputs, inputs, result)
        })
    }

    pub(crate) fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work> {
        // SAFETY: as above.
        work(|result| unsafe { rlhf_send(self.0, raw(tensor), number(to), tag, result) })
    }

    pub(crate) fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work> {
        // SAFETY: as above.
        work(|result| unsafe { rlhf_recv(self.0, raw(tensor), number(from), tag, result) })
    }
}

fn work(start: impl FnOnce(*mut Opaque) -> Message) -> Result<Work> {
    let mut result = null_mut();
    check(start(&mut result))?;
    Ok(Work(result))
}

/// Text for C, cut at a NUL, which no host name or key of ours has.
fn text(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

fn millis(limit: Duration) -> i64 {
    i64::try_from(limit.as_millis()).unwrap_or(i64::MAX)
}

fn number(rank: usize) -> c_int {
    c_int::try_from(rank).unwrap_or(c_int::MAX)
}
