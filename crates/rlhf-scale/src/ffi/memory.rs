//! Counting the bytes that libtorch allocates.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr::null_mut;

use super::{Message, check};
use crate::Result;

unsafe extern "C" {
    fn rlhf_meter_begin(measurement: *mut *mut c_void) -> Message;
    fn rlhf_meter_read(measurement: *mut c_void, peak: *mut u64, live: *mut u64);
    fn rlhf_meter_end(measurement: *mut c_void);
}

/// Counts what this thread allocates while it lives. It must end on its thread (it is not `Send`)
/// and before those that began earlier, which [`measure_memory`](crate::measure_memory) sees to.
pub(crate) struct Meter {
    measurement: *mut c_void,
    thread: PhantomData<*const ()>,
}

impl Meter {
    pub(crate) fn begin() -> Result<Self> {
        let mut measurement = null_mut();
        // SAFETY: set exactly when no error is returned.
        check(unsafe { rlhf_meter_begin(&mut measurement) })?;
        Ok(Self {
            measurement,
            thread: PhantomData,
        })
    }

    /// The most bytes at a time, and those of now.
    pub(crate) fn read(&self) -> (u64, u64) {
        let (mut peak, mut live) = (0, 0);
        // SAFETY: made by `begin`, not yet ended.
        unsafe { rlhf_meter_read(self.measurement, &mut peak, &mut live) };
        (peak, live)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // SAFETY: made by `begin` on this thread, ended once.
        unsafe { rlhf_meter_end(self.measurement) }
    }
}
