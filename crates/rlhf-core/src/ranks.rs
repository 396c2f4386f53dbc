//! All processes that a statistic of a step comes from.

use std::fmt::Display;

use tch::Tensor;

use crate::replicas::{decode, encode};
use crate::{Error, ParameterShards, PipelineStage, Replicas, Result};

/// The processes that train one model together: the [replicas](Replicas) that have other data, and
/// of each the [stages](PipelineStage) that its blocks are spread over.
///
/// What is brought together here is what the last stages have computed, of all data; every process
/// gets it. A model on one rank alone is the default, for which everything here is nothing.
#[derive(Debug, Clone, Default)]
pub struct Ranks {
    replicas: Replicas,
    stage: Option<PipelineStage>,
}

impl Ranks {
    /// Those that `replicas` and the stages of `shards` make.
    pub fn new(replicas: Replicas, shards: Option<&ParameterShards>) -> Self {
        let stage = shards.and_then(ParameterShards::stage).cloned();
        Self { replicas, stage }
    }

    /// Whether everything is computed here.
    pub fn is_one(&self) -> bool {
        self.replicas.size() == 1 && self.stage.is_none()
    }

    /// As [`Replicas::gather_columns`], of the last stages.
    ///
    /// # Errors
    /// As [`Replicas::gather_columns`]; [`Error::Peer`] where another stage failed.
    pub fn gather_columns<E>(&self, own: Result<Vec<Tensor>, E>) -> Result<Vec<Tensor>, E>
    where
        E: From<Error> + Display,
    {
        let all = self.replicas.gather_columns(own);
        let Some(stage) = &self.stage else {
            return all;
        };
        let bytes = all.and_then(|columns| Ok(encode(&columns)?));
        Ok(decode(&stage.of_last(bytes)?)?)
    }

    /// As [`Replicas::gather_rows`], of the last stages.
    ///
    /// # Errors
    /// As [`Replicas::gather_rows`] and [`gather_columns`](Self::gather_columns).
    pub fn gather_rows<E>(&self, own: Result<Option<Tensor>, E>) -> Result<Tensor, E>
    where
        E: From<Error> + Display,
    {
        let own = own.map(|rows| rows.into_iter().collect());
        self.gather_columns(own)?
            .pop()
            .ok_or_else(crate::replicas::nothing)
    }

    /// As [`Replicas::sum`], of the last stages.
    ///
    /// # Errors
    /// As [`Replicas::sum`]; [`Error::Peer`] where another stage failed.
    pub fn sum<E: From<Error> + Display>(&self, own: Result<Vec<f64>, E>) -> Result<Vec<f64>, E> {
        let all = self.replicas.sum(own);
        let Some(stage) = &self.stage else {
            return all;
        };
        let bytes = all.map(|numbers| numbers.iter().flat_map(|n| n.to_le_bytes()).collect());
        let bytes = stage.of_last(bytes)?;
        let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().unwrap_or_default());
        Ok(bytes.chunks_exact(8).map(number).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::stage::testing::on_stages;

    fn on_ranks<T: Send>(work: impl Fn(usize, &Ranks) -> T + Sync) -> Vec<T> {
        on_stages(|rank, stage| {
            let shards = ParameterShards::of_stage(stage);
            work(rank, &Ranks::new(Replicas::alone(), Some(&shards)))
        })
    }

    #[test]
    fn the_numbers_of_the_last_stage_count() {
        let heard = on_ranks(|rank, ranks| {
            let own = vec![rank as f64, if rank == 0 { f64::NAN } else { 7.5 }];
            let sums = ranks.sum::<Error>(Ok(own)).unwrap();
            let rows = Tensor::from_slice(&[rank as f32, 3.0]).view([2, 1]);
            let rows = ranks.gather_rows::<Error>(Ok(Some(rows))).unwrap();
            let rows = Vec::<f32>::try_from(rows.view(-1)).unwrap();
            (ranks.is_one(), sums, rows)
        });
        for heard in heard {
            assert_eq!(heard, (false, vec![1.0, 7.5], vec![1.0, 3.0]));
        }
    }

    #[test]
    fn the_error_of_any_stage_is_everybodys() {
        for failing in [0, 1] {
            let errors = on_ranks(|rank, ranks| {
                let own = match rank == failing {
                    true => Err(Error::config("a", 1, "b")),
                    false => Ok(vec![1.0]),
                };
                ranks.sum(own).unwrap_err()
            });
            for (rank, error) in errors.iter().enumerate() {
                let own = matches!(error, Error::InvalidConfig { .. });
                let other = matches!(error, Error::Peer { rank, .. } if *rank == failing);
                assert!(if rank == failing { own } else { other }, "{error}");
            }
        }
    }
}
