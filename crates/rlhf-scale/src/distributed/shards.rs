//! An optimiser whose state is spread over processes, and its files, which know nothing of that.

use tch::{Device, Kind, Tensor};

use super::ReduceOp;
use super::layout::{Piece, flat, shaped, stepped_kind};
use super::reduction::Reduction;
use crate::adamw::{SlotState, Stretch};
use crate::{AdamW, AdamWConfig, Result, ffi};

/// A name of [`AdamW::state`], and what it stands for.
type Part = (&'static str, fn(&SlotState) -> &Tensor);

/// The parts of the state that are as large as the parameters.
const PARTS: [Part; 3] = [
    ("exp_avg", |slot| &slot.exp_avg),
    ("exp_avg_sq", |slot| &slot.exp_avg_sq),
    ("master", |slot| &slot.weight),
];

impl Reduction {
    /// Of what this process steps.
    pub(crate) fn optimizer(
        &self,
        params: Vec<(String, Tensor)>,
        config: &AdamWConfig,
    ) -> Result<AdamW> {
        let Some(layout) = self.shards() else {
            return AdamW::new(params, config);
        };
        AdamW::of_stretches(params, config, |param| {
            let piece = layout.pieces.iter().find(|piece| piece.param == param)?;
            Some(Stretch::Part {
                from: piece.from,
                length: piece.length,
            })
        })
    }

    /// Whether this process steps parts only.
    pub(crate) fn is_sharded(&self) -> bool {
        self.shards().is_some()
    }

    /// The parameter that a stepped part belongs to.
    pub(crate) fn param_of(&self, slot: usize) -> usize {
        match self.shards() {
            Some(layout) => layout.pieces.get(slot).map_or(slot, |piece| piece.param),
            None => slot,
        }
    }

    /// The whole state of a sharded optimiser, as [`AdamW::state`] has it, on the CPU of the first
    /// process; nothing on the others, which call this too.
    pub(crate) fn whole_state(
        &self,
        optimizer: &AdamW,
        names: &[(String, Tensor)],
    ) -> Result<Vec<(String, Tensor)>> {
        let slots = optimizer.parts();
        let first = self.group().rank() == 0;
        let mut state = Vec::new();
        for (part, of) in PARTS {
            let pieces: Vec<Tensor> = slots.iter().map(|slot| of(slot).shallow_clone()).collect();
            self.gather(&pieces, stepped_kind, |param, row| {
                let (name, like) = &names[param];
                if first && (part != "master" || like.kind() != stepped_kind(like.kind())) {
                    let whole = shaped(row, like)?.f_to_device(Device::Cpu)?;
                    let whole = whole.f_to_dtype(whole.kind(), false, true)?;
                    state.push((format!("{part}.{name}"), whole));
                }
                Ok(())
            })?;
        }
        for ((name, _), step) in names.iter().zip(self.steps(&slots)?) {
            if first {
                state.push((format!("step.{name}"), Tensor::from(step)));
            }
        }
        Ok(state)
    }

    /// Steps of each parameter, which a process knows of those that it has a piece of.
    fn steps(&self, slots: &[SlotState]) -> Result<Vec<f32>> {
        let mut steps = vec![0f32; self.params().len()];
        for (piece, slot) in self.pieces().iter().zip(slots) {
            steps[piece.param] = f64::try_from(&slot.step)? as f32;
        }
        let steps = Tensor::from_slice(&steps).f_to_device(self.group().device())?;
        self.group().all_reduce(&steps, ReduceOp::Max)?;
        Ok(Vec::try_from(steps.f_to_device(Device::Cpu)?)?)
    }

    /// Names, shapes and kinds of [`whole_state`](Self::whole_state), of tensors that take no
    /// memory.
    pub(crate) fn expected_state(
        &self,
        names: &[(String, Tensor)],
    ) -> Result<Vec<(String, Tensor)>> {
        let mut expected = Vec::new();
        for (name, param) in names {
            let kind = stepped_kind(param.kind());
            let one = Tensor::f_zeros([1], (kind, Device::Cpu))?;
            let whole = one.f_expand(param.size(), false)?;
            for (part, _) in PARTS {
                if part != "master" || kind != param.kind() {
                    expected.push((format!("{part}.{name}"), whole.shallow_clone()));
                }
            }
            let step = Tensor::f_zeros([], (Kind::Float, Device::Cpu))?;
            expected.push((format!("step.{name}"), step));
        }
        Ok(expected)
    }

    /// Takes this process's pieces out of the tensors of a file, which are those of
    /// [`expected_state`](Self::expected_state).
    pub(crate) fn restore_state(
        &self,
        optimizer: &AdamW,
        whole: &[Tensor],
        names: &[(String, Tensor)],
    ) -> Result<()> {
        let expected = self.expected_state(names)?;
        let slots = optimizer.parts();
        let find = |wanted: &str| expected.iter().position(|(name, _)| name == wanted);
        for (piece, slot) in self.pieces().iter().zip(&slots) {
            let (name, param) = &names[piece.param];
            for (part, of) in PARTS {
                if let Some(at) = find(&format!("{part}.{name}")) {
                    let row = flat(&whole[at].f_to_device(param.device())?, param)?;
                    let row = row.f_narrow(0, piece.from, piece.length)?;
                    ffi::copy_all(&[of(slot)], &[&row])?;
                }
            }
            if let Some(at) = find(&format!("step.{name}")) {
                ffi::copy_all(&[&slot.step], &[&whole[at].f_to_device(param.device())?])?;
            }
        }
        Ok(())
    }

    fn pieces(&self) -> &[Piece] {
        self.shards().map_or(&[], |layout| &layout.pieces)
    }
}
