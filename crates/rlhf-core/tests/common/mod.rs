//! The smallest policy there is.

use rlhf_core::{PaddedBatch, Parameters, Policy, Result, Tensor};

/// Logits of the next token depend on the last token alone: row `i` of the table holds those
/// after token `i`.
pub(crate) struct Bigram {
    pub(crate) table: Tensor,
    pub(crate) max_length: Option<usize>,
}

impl Bigram {
    pub(crate) fn new<const V: usize>(table: [[f32; V]; V]) -> Self {
        Self {
            table: Tensor::from_slice2(&table),
            max_length: None,
        }
    }

    /// A table of pseudo-random logits between -2 and 2.
    pub(crate) fn arbitrary<const V: usize>() -> Self {
        let mut state = 1u32;
        let table = [[(); V]; V].map(|row| {
            row.map(|()| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 22) as f32 - 2.0
            })
        });
        Self::new(table)
    }
}

impl Parameters for Bigram {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".into(), self.table.shallow_clone())]
    }
}

impl Policy for Bigram {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        let size = batch.input_ids.size();
        let rows = self.table.f_index_select(0, &batch.input_ids.view(-1))?;
        Ok(rows.view([size[0], size[1], -1]))
    }

    fn max_length(&self) -> Option<usize> {
        self.max_length
    }
}
