//! What a template may use up. It comes with a downloaded model and is a program.

use std::io;

use minijinja::ErrorKind;

use super::{ChatMessage, ChatOptions};

/// Longest template, in bytes. The longest in use have some 20,000.
pub(super) const SOURCE_LIMIT: usize = 1 << 20;
/// Longest text that a template may write, in bytes.
pub(super) const OUTPUT_LIMIT: usize = 64 << 20;
/// How deep macros and loops may call themselves.
pub(super) const RECURSION_LIMIT: usize = 100;

/// Number of instructions that a template may run: enough for any that reads each message a few
/// times (one in use takes 50 to 300 for a message), and over within a second.
pub(super) fn fuel(messages: &[ChatMessage], options: &ChatOptions) -> u64 {
    let items = messages.len() + options.tools.len() + options.documents.len();
    200_000 + 5_000 * items as u64
}

pub(super) fn too_long() -> minijinja::Error {
    minijinja::Error::new(
        ErrorKind::InvalidOperation,
        format!("the template writes more than {OUTPUT_LIMIT} bytes"),
    )
}

/// Text that may not grow past [`OUTPUT_LIMIT`].
#[derive(Default)]
pub(super) struct Bounded(Vec<u8>);

impl Bounded {
    pub(super) fn into_string(self) -> Result<String, minijinja::Error> {
        String::from_utf8(self.0).map_err(|error| {
            minijinja::Error::new(ErrorKind::BadSerialization, "the text is not UTF-8")
                .with_source(error)
        })
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(io::Error::other(too_long()));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
