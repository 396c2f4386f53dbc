//! Who takes part in a run, and where they meet.

use std::env;
use std::time::Duration;

use rlhf_core::Error as CoreError;

use crate::{Error, Result};

/// What moves the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// Between CPUs, over TCP. The network interface is that of the host's name, or the one in
    /// `GLOO_SOCKET_IFNAME`.
    #[default]
    Gloo,
    /// Between CUDA devices. Needs the feature `nccl`. Compiles, and has not been run.
    Nccl,
}

/// How the processes of a run talk.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupOptions {
    /// What moves the numbers.
    pub backend: Backend,
    /// How long an operation may take, waiting for the slowest rank included, and how long ranks
    /// may take to meet.
    pub limit: Duration,
}

impl Default for GroupOptions {
    /// Gloo, and the 30 minutes of `torch.distributed`.
    fn default() -> Self {
        Self {
            backend: Backend::Gloo,
            limit: Duration::from_secs(30 * 60),
        }
    }
}

impl GroupOptions {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        if self.limit < Duration::from_millis(100) {
            let reason = "is shorter than a tenth of a second; give ranks the time to meet";
            let value = format!("{:?}", self.limit);
            return Err(CoreError::config("limit", value, reason).into());
        }
        if self.backend == Backend::Nccl && !cfg!(feature = "nccl") {
            let reason = "needs rlhf-scale built with the feature `nccl`, and a libtorch with CUDA";
            return Err(CoreError::config("backend", "nccl", reason).into());
        }
        Ok(())
    }
}

/// Who keeps the store that processes meet at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreHost {
    /// Rank 0 of the run, for as long as it lives.
    FirstRank,
    /// The launcher (`TORCHELASTIC_USE_AGENT_STORE`), which starts ranks again after a failure and
    /// tells the attempts apart by this number.
    Launcher {
        /// `TORCHELASTIC_RESTART_COUNT`.
        attempt: u64,
    },
}

/// A process's place in a run, and where the run meets.
///
/// ```
/// use rlhf_scale::distributed::{Rendezvous, StoreHost};
///
/// let second = Rendezvous {
///     rank: 1,
///     size: 2,
///     local_rank: 1,
///     host: "127.0.0.1".into(),
///     port: 29500,
///     store: StoreHost::FirstRank,
/// };
/// assert!(second.validate().is_ok());
/// assert!(Rendezvous { rank: 2, ..second }.validate().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// This process among all, from 0.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// This process among those of its machine: the number of its CUDA device.
    pub local_rank: usize,
    /// Name or address of the machine with the store.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Who keeps the store.
    pub store: StoreHost,
}

impl Rendezvous {
    /// What torchrun, or another launcher, has set: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
    /// `MASTER_PORT`; where there are any, `LOCAL_RANK` (else 0),
    /// `TORCHELASTIC_USE_AGENT_STORE` and `TORCHELASTIC_RESTART_COUNT`. `None` where `RANK` and
    /// `WORLD_SIZE` are both unset: the program was started alone.
    ///
    /// # Errors
    /// [`Error::Environment`] for a variable that is missing or is no number.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        if get("RANK").is_none() && get("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let launcher = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|set| set == "True");
        let number = |name| number(name, get(name));
        let optional = |name| get(name).map_or(Ok(0), |text| self::number(name, Some(text)));
        let rendezvous = Self {
            rank: number("RANK")? as usize,
            size: number("WORLD_SIZE")? as usize,
            local_rank: optional("LOCAL_RANK")? as usize,
            host: get("MASTER_ADDR").ok_or_else(|| unset("MASTER_ADDR"))?,
            port: u16::try_from(number("MASTER_PORT")?).map_err(|_| Error::Environment {
                variable: "MASTER_PORT",
                problem: "is above 65535".into(),
            })?,
            store: match launcher {
                true => StoreHost::Launcher {
                    attempt: optional("TORCHELASTIC_RESTART_COUNT")?,
                },
                false => StoreHost::FirstRank,
            },
        };
        rendezvous.validate()?;
        Ok(Some(rendezvous))
    }

    /// Checks that the rank is one of the run.
    ///
    /// # Errors
    /// [`Error::Environment`] otherwise.
    pub fn validate(&self) -> Result<()> {
        let problem = match (self.rank, self.size) {
            (_, 0) => ("WORLD_SIZE", "is 0".to_string()),
            (rank, size) if rank >= size => ("RANK", format!("is {rank}, not below {size}")),
            (_, size) if size > i32::MAX as usize => ("WORLD_SIZE", format!("is {size}")),
            _ => return Ok(()),
        };
        let (variable, problem) = problem;
        Err(Error::Environment { variable, problem })
    }

    /// Whether this process keeps the store.
    pub(super) fn serves(&self) -> bool {
        self.store == StoreHost::FirstRank && self.rank == 0
    }

    /// What `torch.distributed` puts before keys in the launcher's store.
    pub(super) fn prefix(&self) -> String {
        match self.store {
            StoreHost::FirstRank => String::new(),
            StoreHost::Launcher { attempt } => format!("/worker/attempt_{attempt}"),
        }
    }
}

fn number(variable: &'static str, value: Option<String>) -> Result<u64> {
    let value = value.ok_or_else(|| unset(variable))?;
    value.trim().parse().map_err(|_| Error::Environment {
        variable,
        problem: format!("is {value:?}, not a number"),
    })
}

fn unset(variable: &'static str) -> Error {
    Error::Environment {
        variable,
        problem: "is not set".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Rendezvous>> {
        Rendezvous::from_variables(|name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| value.to_string())
        })
    }

    const TORCHRUN: [(&str, &str); 7] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
    ];

    #[test]
    fn what_torchrun_sets_is_read() {
        let place = read(&TORCHRUN).unwrap().unwrap();
        assert_eq!((place.rank, place.size, place.local_rank), (3, 4, 1));
        assert_eq!((place.host.as_str(), place.port), ("node0", 29500));
        assert_eq!(place.prefix(), "/worker/attempt_2");
        assert!(!place.serves());
        assert_eq!(read(&[("MASTER_PORT", "1")]).unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let without = |name: &str| {
            let rest: Vec<_> = TORCHRUN.into_iter().filter(|(n, _)| *n != name).collect();
            read(&rest).unwrap_err().to_string()
        };
        for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
            let message = without(name);
            assert!(
                message.starts_with(&format!("{name} is not set")),
                "{message}"
            );
        }
        for (name, value) in [
            ("RANK", "4"),
            ("RANK", "one"),
            ("WORLD_SIZE", "0"),
            ("MASTER_PORT", "70000"),
        ] {
            let mut variables = TORCHRUN;
            for variable in &mut variables {
                if variable.0 == name {
                    variable.1 = value;
                }
            }
            let message = read(&variables).unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
