//! Makes libtorch findable at run time, with nothing exported.
//!
//! Cargo puts the link-search folders that lie inside the target folder on the library path of what it runs
//! (`cargo run`, `cargo test`, doctests), in this workspace and in every crate that depends on this one. A symbolic
//! link in `OUT_DIR` makes a libtorch from elsewhere qualify.
//!
//! A binary that is executed without cargo needs an rpath, and an rpath reaches no dependents. Its crate can depend
//! on `rlhf-core` directly and say, in a `build.rs` of its own:
//!
//! ```ignore
//! fn main() {
//!     println!("cargo::rustc-link-arg=-Wl,-rpath,{}", std::env::var("DEP_RLHF_CORE_LIBTORCH_LIB").unwrap());
//! }
//! ```
#![allow(clippy::print_stdout)]

use std::env;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in [
        "LIBTORCH",
        "LIBTORCH_LIB",
        "LIBTORCH_USE_PYTORCH",
        "DOCS_RS",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_DOC_ONLY").is_some() || env::var_os("DOCS_RS").is_some() {
        return;
    }
    if let Err(error) = publish_libtorch() {
        println!("cargo::error={error}");
    }
}

fn publish_libtorch() -> Result<(), Error> {
    let published = env::var_os("DEP_TCH_LIBTORCH_LIB").ok_or(Error::Unpublished)?;
    let lib = PathBuf::from(published);
    let lib = lib
        .canonicalize()
        .map_err(|source| Error::NoFolder { lib, source })?;
    println!("cargo::metadata=libtorch_lib={}", lib.display());
    let search = search_folder(lib)?;
    println!("cargo::rustc-link-search=native={}", search.display());
    Ok(())
}

#[cfg(unix)]
fn search_folder(lib: PathBuf) -> Result<PathBuf, Error> {
    let out = env::var_os("OUT_DIR").ok_or(Error::NoOutDir)?;
    let link = Path::new(&out).join("libtorch-lib");
    match std::fs::remove_file(&link) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Link { link, source });
        }
        _ => {}
    }
    match std::os::unix::fs::symlink(lib, &link) {
        Ok(()) => Ok(link),
        Err(source) => Err(Error::Link { link, source }),
    }
}

/// Elsewhere a link needs privileges; the linker is served by the folder itself.
#[cfg(not(unix))]
fn search_folder(lib: PathBuf) -> Result<PathBuf, Error> {
    Ok(lib)
}

enum Error {
    Unpublished,
    NoFolder { lib: PathBuf, source: io::Error },
    NoOutDir,
    Link { link: PathBuf, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unpublished => write!(
                f,
                "torch-sys did not say where libtorch is (DEP_TCH_LIBTORCH_LIB is not set): it does on Linux and \
                 macOS. To build the documentation without libtorch, use the feature `doc-only`"
            ),
            Self::NoFolder { lib, source } => write!(
                f,
                "the libtorch folder {} cannot be opened ({source}): run scripts/with-libtorch once, or set \
                 LIBTORCH to a libtorch that exists",
                lib.display()
            ),
            Self::NoOutDir => write!(f, "cargo set no OUT_DIR for the build script of rlhf-core"),
            Self::Link { link, source } => {
                write!(f, "cannot make the link {}: {source}", link.display())
            }
        }
    }
}
