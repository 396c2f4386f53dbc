//! What stands in for several processes where the feature `distributed` is off.

use rlhf_core::Replicas;
use tch::Tensor;

use crate::{AdamW, AdamWConfig, Error, Result};

/// There is none.
#[derive(Debug)]
pub(crate) enum Reduction {}

impl Reduction {
    pub(crate) fn of_run(_: &[(String, Tensor)]) -> Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn replicas(&self) -> &Replicas {
        match *self {}
    }

    pub(crate) fn optimizer(&self, _: Vec<(String, Tensor)>, _: &AdamWConfig) -> Result<AdamW> {
        match *self {}
    }

    pub(crate) fn is_sharded(&self) -> bool {
        match *self {}
    }

    pub(crate) fn param_of(&self, _: usize) -> usize {
        match *self {}
    }

    pub(crate) fn arm(&mut self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn complete(&mut self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn explain(&self, _: Error) -> Error {
        match *self {}
    }

    pub(crate) fn sum(&self, _: Vec<Option<Tensor>>, _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        match *self {}
    }

    pub(crate) fn norm(&self, _: f64) -> Result<f64> {
        match *self {}
    }

    pub(crate) fn least(&self, _: usize) -> Result<usize> {
        match *self {}
    }

    pub(crate) fn share_weights(&self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn whole_state(
        &self,
        _: &AdamW,
        _: &[(String, Tensor)],
    ) -> Result<Vec<(String, Tensor)>> {
        match *self {}
    }

    pub(crate) fn restore_state(
        &self,
        _: &AdamW,
        _: &[Tensor],
        _: &[(String, Tensor)],
    ) -> Result<()> {
        match *self {}
    }

    pub(crate) fn expected_state(&self, _: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        match *self {}
    }
}
