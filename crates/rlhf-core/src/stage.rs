//! Ranks that have a model's blocks one after another.

use std::fmt::{self, Debug, Display};
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::{Collective, Error, Result};

/// One of the stages that the blocks of a model are spread over.
///
/// What a model computes comes out in the last stage. What all stages go on with, or decide by, is
/// what the last one [tells](Self::tell) them.
#[derive(Clone)]
pub struct PipelineStage {
    /// The stages, in order.
    pub group: Arc<dyn Collective>,
    /// Where what they send each other lies.
    pub device: Device,
    /// Weights that another stage has, too, by the stage's rank: a gradient is the sum of both.
    pub tied: Vec<(String, usize)>,
}

impl Debug for PipelineStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stage, stages) = (self.group.rank(), self.group.size());
        write!(f, "PipelineStage({stage} of {stages})")
    }
}

impl PipelineStage {
    /// Whether losses are computed here, in the last stage.
    pub fn has_loss(&self) -> bool {
        self.group.rank() == self.last()
    }

    /// Microbatches whose forward pass is done before the first backward: the later stages are then
    /// busy with them.
    pub fn ahead(&self) -> usize {
        self.last() - self.group.rank()
    }

    fn last(&self) -> usize {
        self.group.size() - 1
    }

    /// Puts the last stage's elements in the place of the others', which have the same shape and
    /// kind. All stages call it.
    ///
    /// # Errors
    /// Those of [`Collective::broadcast`].
    pub fn tell(&self, tensor: &Tensor) -> Result<()> {
        self.group.broadcast(tensor, self.last())
    }

    /// What the last stage hands in, in all of them. If a stage hands in an error, all get one: that
    /// stage its own, the others [`Error::Peer`], naming it.
    ///
    /// # Errors
    /// Those that were handed in, and those of the group.
    pub fn of_last<E>(&self, own: Result<Vec<u8>, E>) -> Result<Vec<u8>, E>
    where
        E: From<Error> + Display,
    {
        // Who failed, from 1 on, and how much is to come.
        let header = match &own {
            Ok(bytes) if self.has_loss() => [0, bytes.len() as i64],
            Ok(_) => [0, 0],
            Err(_) => [self.group.rank() as i64 + 1, 0],
        };
        let heard = self.largest(&header);
        let bytes = own?;
        let [failed, length] = heard?;
        if failed > 0 {
            let message = "see what that stage says itself".to_string();
            let rank = failed as usize - 1;
            return Err(Error::Peer { rank, message }.into());
        }
        Ok(self.bytes_of_last(bytes, length as usize)?)
    }

    fn largest(&self, numbers: &[i64; 2]) -> Result<[i64; 2]> {
        let tensor = Tensor::from_slice(numbers).f_to_device(self.device)?;
        self.group.all_reduce(&tensor, crate::Reduction::Max)?;
        let numbers = Vec::<i64>::try_from(tensor.f_to_device(Device::Cpu)?)?;
        Ok([numbers[0], numbers[1]])
    }

    /// The last stage's bytes, of which all know how many there are.
    pub(crate) fn bytes_of_last(&self, own: Vec<u8>, length: usize) -> Result<Vec<u8>> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let tensor = match self.has_loss() {
            true => Tensor::from_slice(&own).f_to_device(self.device)?,
            false => Tensor::f_zeros([length as i64], (Kind::Uint8, self.device))?,
        };
        self.tell(&tensor)?;
        Ok(Vec::<u8>::try_from(tensor.f_to_device(Device::Cpu)?)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing {
    use super::*;
    use crate::Reduction;
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// One of two stages that are threads.
    struct Thread {
        rank: usize,
        to: Mutex<Sender<Tensor>>,
        from: Mutex<Receiver<Tensor>>,
    }

    impl Thread {
        fn swap(&self, own: &Tensor) -> Tensor {
            self.to.lock().unwrap().send(own.copy()).unwrap();
            self.from.lock().unwrap().recv().unwrap()
        }
    }

    impl Collective for Thread {
        fn rank(&self) -> usize {
            self.rank
        }
        fn size(&self) -> usize {
            2
        }
        fn all_reduce(&self, tensor: &Tensor, _: Reduction) -> Result<()> {
            let largest = tensor.maximum(&self.swap(tensor));
            tensor.shallow_clone().copy_(&largest);
            Ok(())
        }
        fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
            Ok(vec![tensor.copy(), self.swap(tensor)])
        }
        fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()> {
            let other = self.swap(tensor);
            if from != self.rank {
                tensor.shallow_clone().copy_(&other);
            }
            Ok(())
        }
        fn send(&self, _: &Tensor, _: usize) -> Result<()> {
            Ok(())
        }
        fn receive(&self, _: &Tensor, _: usize) -> Result<()> {
            Ok(())
        }
    }

    /// Runs `work` on two stages that are threads; what each returned.
    pub(crate) fn on_stages<T: Send>(work: impl Fn(usize, PipelineStage) -> T + Sync) -> Vec<T> {
        let (first, second) = (channel(), channel());
        let ends = [(first.0, second.1), (second.0, first.1)];
        std::thread::scope(|scope| {
            let threads: Vec<_> = ends
                .into_iter()
                .enumerate()
                .map(|(rank, (to, from))| {
                    let work = &work;
                    scope.spawn(move || {
                        let stage = PipelineStage {
                            group: Arc::new(Thread {
                                rank,
                                to: Mutex::new(to),
                                from: Mutex::new(from),
                            }),
                            device: Device::Cpu,
                            tied: Vec::new(),
                        };
                        work(rank, stage)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }
}
