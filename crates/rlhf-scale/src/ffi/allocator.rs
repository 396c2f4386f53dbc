//! Memory of all but small tensors, kept for the next ones.

use std::sync::Once;

use super::{Message, check};
use crate::Result;

unsafe extern "C" {
    fn rlhf_reuse_memory() -> Message;
    fn rlhf_release_memory() -> Message;
}

/// Lets libtorch's CPU tensors of 64 KiB or more take memory that earlier ones have left, from now
/// on and in the whole process; Linux only.
///
/// malloc gives large blocks back to the system, which clears each of their pages when it hands them
/// out again. A step of training makes and frees the same tensors every time, and spends a fifth of
/// its time on that; and what malloc keeps, blocks below a MiB or so, is soon full of holes. What is
/// kept here is at most what was in use at some time, and a sixty-fourth part of it or 32 MiB more:
/// beyond that, free pages go back to the system. [`release_memory`] gives back all that
/// is unused.
///
/// The models of `rlhf-models` call this when the first is built. The environment variable
/// `RLHF_CPU_ALLOCATOR=system` leaves everything to malloc.
///
/// # Errors
/// libtorch's, if another allocator has been registered that goes before this one.
pub fn reuse_memory() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        if std::env::var_os("RLHF_CPU_ALLOCATOR").is_some_and(|name| name == "system") {
            return;
        }
        // SAFETY: replaces a pointer that libtorch reads at every allocation.
        result = check(unsafe { rlhf_reuse_memory() });
    });
    result
}

/// Gives the memory that [`reuse_memory`] keeps and no tensor uses back to the system. What tensors
/// need from now on bounds what is kept.
///
/// # Errors
/// None in practice; C++ exceptions.
pub fn release_memory() -> Result<()> {
    // SAFETY: touches only what no tensor uses.
    check(unsafe { rlhf_release_memory() })
}
