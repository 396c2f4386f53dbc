//! The arithmetic: forward and backward of one chunk of tokens after another.

use tch::{Kind, Tensor};

use crate::{Result, Saved};

/// When the gradient of the hidden states is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gradient {
    /// Never.
    None,
    /// In backward, from the logits computed again.
    Later,
    /// In forward, while the logits are there: `∂ logprob / ∂ hidden`, which backward multiplies by
    /// each token's gradient.
    Ahead,
}

/// The tensors of the output layer, detached.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) hidden: &'a Tensor,
    pub(super) weight: &'a Tensor,
    pub(super) bias: Option<&'a Tensor>,
}

/// What does not depend on the operands' values.
pub(super) struct OutputLayer {
    pub(super) ids: Tensor,
    pub(super) temperature: f64,
    pub(super) softcap: Option<f64>,
    pub(super) chunk_rows: i64,
}

/// What forward computes for each of `M` tokens, in f32.
pub(super) struct Scores {
    /// `[M]`
    pub(super) logprobs: Tensor,
    /// `[M]`
    pub(super) entropy: Option<Tensor>,
    /// `[M, 1]`, logarithm of the sum of the exponentials of the logits.
    normalizers: Tensor,
    /// `[M, H]`, of the hidden states' kind: `∂ logprob / ∂ hidden`.
    directions: Option<Tensor>,
}

/// Everything that backward needs.
pub(super) struct Kept {
    layer: OutputLayer,
    scores: Scores,
    hidden: Option<Saved>,
    weight: Option<Saved>,
    bias: Option<Saved>,
}

impl OutputLayer {
    /// Runs under `no_grad`.
    pub(super) fn forward(
        &self,
        operands: Operands<'_>,
        with_entropy: bool,
        gradient: Gradient,
    ) -> Result<Scores> {
        let device = operands.hidden.device();
        let tokens = self.ids.size()[0];
        let column = || Tensor::f_empty([tokens, 1], (Kind::Float, device));
        let (logprobs, normalizers) = (column()?, column()?);
        let entropy = if with_entropy { Some(column()?) } else { None };
        let directions = match gradient {
            Gradient::Ahead => Some(operands.hidden.f_empty_like()?),
            Gradient::None | Gradient::Later => None,
        };
        let mut buffers = Buffers::new(self, operands, with_entropy)?;
        for (start, rows) in self.chunks() {
            let rows_of = |tensor: &Tensor| tensor.f_narrow(0, start, rows);
            let ids = rows_of(&self.ids)?.f_unsqueeze(1)?;
            // z, then z - max z, so that the exponentials do not overflow.
            let mut logits = buffers.logits(operands, start, rows)?;
            let maxima = logits.f_amax([-1i64].as_slice(), true)?;
            let _ = logits.f_sub_(&maxima)?;
            let chosen = logits.f_gather(1, &ids, false)?;
            let mut exponentials = match &buffers.second {
                Some(second) => logits.f_exp_out(&second.f_narrow(0, 0, rows)?)?,
                None => logits.f_exp_()?,
            };
            let sums = exponentials.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
            let log_sums = sums.f_log()?;
            rows_of(&logprobs)?.f_copy_(&chosen.f_sub(&log_sums)?)?;
            rows_of(&normalizers)?.f_copy_(&maxima.f_add(&log_sums)?)?;
            if let Some(entropy) = &entropy {
                // log Σ e^z - Σ p z, both relative to the maximum.
                let _ = logits.f_mul_(&exponentials)?;
                let mean = logits.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
                rows_of(entropy)?.f_copy_(&log_sums.f_sub(&mean.f_div(&sums)?)?)?;
            }
            if let Some(directions) = &directions {
                // (W[id] - p W) / temperature
                let kind = operands.weight.kind();
                let probabilities = exponentials.f_div_(&sums)?.f_to_kind(kind)?;
                let expected = probabilities.f_mm(operands.weight)?;
                let own = operands.weight.f_index_select(0, &rows_of(&self.ids)?)?;
                let direction = own.f_sub(&expected)?.f_div_scalar(self.temperature)?;
                rows_of(directions)?.f_copy_(&direction)?;
            }
        }
        Ok(Scores {
            logprobs: logprobs.f_squeeze_dim(1)?,
            entropy: match entropy {
                Some(entropy) => Some(entropy.f_squeeze_dim(1)?),
                None => None,
            },
            normalizers,
            directions,
        })
    }

    /// `∂ capped / ∂ logit` of logits that are capped, and divided by the temperature.
    fn slope(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        let Some(cap) = self.softcap else {
            return Ok(None);
        };
        let mut tangents = logits.f_mul_scalar(self.temperature / cap)?;
        Ok(Some(tangents.f_square_()?.f_neg_()?.f_add_scalar_(1.0)?))
    }

    /// First row and number of rows of every chunk.
    fn chunks(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let (tokens, step) = (self.ids.size()[0], self.chunk_rows);
        (0..tokens)
            .step_by(step as usize)
            .map(move |start| (start, step.min(tokens - start)))
    }
}

impl Kept {
    pub(super) fn new(layer: OutputLayer, operands: Operands<'_>, scores: Scores) -> Result<Self> {
        let (hidden, weight, bias) = match scores.directions {
            Some(_) => (None, None, None),
            None => (
                Some(Saved::new(operands.hidden)?),
                Some(Saved::new(operands.weight)?),
                operands.bias.map(Saved::new).transpose()?,
            ),
        };
        Ok(Self {
            layer,
            scores,
            hidden,
            weight,
            bias,
        })
    }

    /// Gradients of hidden states, weight and bias from those of log-probabilities and entropies.
    pub(super) fn backward(
        &self,
        grads: &[Option<Tensor>],
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let column = |grad: Option<&Option<Tensor>>| -> Result<Option<Tensor>> {
            match grad.and_then(Option::as_ref) {
                Some(grad) => Ok(Some(grad.f_unsqueeze(1)?)),
                None => Ok(None),
            }
        };
        let (grad_logprobs, grad_entropy) = (column(grads.first())?, column(grads.get(1))?);
        let none = || needed.iter().map(|_| None).collect();
        if let Some(directions) = &self.scores.directions {
            let Some(grad) = grad_logprobs else {
                return Ok(none());
            };
            let mut result: Vec<Option<Tensor>> = none();
            result[0] = Some(directions.f_mul(&grad.f_to_kind(directions.kind())?)?);
            return Ok(result);
        }
        let (Some(hidden), Some(weight)) = (&self.hidden, &self.weight) else {
            return Ok(none());
        };
        let operands = Operands {
            hidden: hidden.get()?,
            weight: weight.get()?,
            bias: self.bias.as_ref().map(Saved::get).transpose()?,
        };
        let mut sums = Gradients::new(operands, needed)?;
        let mut buffers = Buffers::new(&self.layer, operands, grad_entropy.is_some())?;
        for (start, rows) in self.layer.chunks() {
            let logits = buffers.logits(operands, start, rows)?;
            let rows_of = |tensor: &Tensor| tensor.f_narrow(0, start, rows);
            let grad_of = |grad: &Option<Tensor>| grad.as_ref().map(rows_of).transpose();
            let chunk = ChunkGrads {
                logprobs: grad_of(&grad_logprobs)?,
                entropy: grad_of(&grad_entropy)?,
            };
            let second = match &buffers.second {
                Some(second) => Some(second.f_narrow(0, 0, rows)?),
                None => None,
            };
            let slope = self.layer.slope(&logits)?;
            let mut grad_logits = self.grad_logits(logits, second, &chunk, start, rows)?;
            if let Some(slope) = slope {
                let _ = grad_logits.f_mul_(&slope)?;
            }
            sums.add(operands, &grad_logits, start, rows)?;
        }
        sums.finish(operands)
    }

    /// Turns the logits `z` of a chunk into their gradient, in place where it can:
    ///
    /// ```text
    /// ∂ logprob / ∂ zⱼ = [j = id] - pⱼ        ∂ entropy / ∂ zⱼ = -pⱼ (log pⱼ + entropy)
    /// ```
    fn grad_logits(
        &self,
        mut logits: Tensor,
        second: Option<Tensor>,
        grads: &ChunkGrads,
        start: i64,
        rows: i64,
    ) -> Result<Tensor> {
        let rows_of = |tensor: &Tensor| tensor.f_narrow(0, start, rows);
        let temperature = self.layer.temperature;
        let own = match &grads.logprobs {
            Some(grad) => grad.f_div_scalar(temperature)?,
            None => Tensor::f_zeros([rows, 1], (Kind::Float, logits.device()))?,
        };
        let mut logprobs = logits.f_sub_(&rows_of(&self.scores.normalizers)?)?;
        let mut result = match (&grads.entropy, &self.scores.entropy, second) {
            (Some(grad), Some(entropy), Some(second)) => {
                let mut probabilities = logprobs.f_exp_out(&second)?;
                let mut factors = logprobs.f_add_(&rows_of(entropy)?.f_unsqueeze(1)?)?;
                let _ = factors.f_mul_(&grad.f_div_scalar(temperature)?)?;
                let _ = factors.f_add_(&own)?;
                probabilities.f_mul_(&factors.f_neg_()?)?
            }
            _ => logprobs.f_exp_()?.f_mul_(&own.f_neg()?)?,
        };
        let ids = rows_of(&self.layer.ids)?.f_unsqueeze(1)?;
        Ok(result.f_scatter_add_(1, &ids, &own)?)
    }
}

/// Gradients of a chunk's outputs, `[rows, 1]`.
struct ChunkGrads {
    logprobs: Option<Tensor>,
    entropy: Option<Tensor>,
}

/// Memory that every chunk uses again, since fresh pages cost as much as the arithmetic on them.
struct Buffers {
    first: Tensor,
    second: Option<Tensor>,
    temperature: f64,
    softcap: Option<f64>,
}

impl Buffers {
    fn new(layer: &OutputLayer, operands: Operands<'_>, two: bool) -> Result<Self> {
        let rows = layer.chunk_rows.min(layer.ids.size()[0]);
        let shape = [rows, operands.weight.size()[0]];
        let buffer = || Tensor::f_empty(shape, (Kind::Float, operands.hidden.device()));
        Ok(Self {
            first: buffer()?,
            second: if two { Some(buffer()?) } else { None },
            temperature: layer.temperature,
            softcap: layer.softcap,
        })
    }

    /// The logits of a chunk in f32, capped, then divided by the temperature.
    fn logits(&mut self, operands: Operands<'_>, start: i64, rows: i64) -> Result<Tensor> {
        let hidden = operands.hidden.f_narrow(0, start, rows)?;
        let weight = operands.weight.f_transpose(0, 1)?;
        let mut logits = self.first.f_narrow(0, 0, rows)?;
        if operands.weight.kind() == Kind::Float {
            let _ = match operands.bias {
                Some(bias) => bias.f_addmm_out(&logits, &hidden, &weight)?,
                None => hidden.f_mm_out(&logits, &weight)?,
            };
        } else {
            let narrow = match operands.bias {
                Some(bias) => bias.f_addmm(&hidden, &weight)?,
                None => hidden.f_mm(&weight)?,
            };
            logits.f_copy_(&narrow)?;
        }
        if let Some(cap) = self.softcap {
            let _ = logits.f_div_scalar_(cap)?.f_tanh_()?.f_mul_scalar_(cap)?;
        }
        if self.temperature != 1.0 {
            let _ = logits.f_div_scalar_(self.temperature)?;
        }
        Ok(logits)
    }
}

/// Sums over chunks, for the operands that need gradients.
struct Gradients {
    hidden: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Gradients {
    fn new(operands: Operands<'_>, needed: &[bool]) -> Result<Self> {
        let is_needed = |i: usize| needed.get(i) == Some(&true);
        let zeros = |like: &Tensor| Tensor::f_zeros(like.size(), (Kind::Float, like.device()));
        let hidden = operands.hidden;
        Ok(Self {
            hidden: is_needed(0).then(|| hidden.f_empty_like()).transpose()?,
            weight: is_needed(1).then(|| zeros(operands.weight)).transpose()?,
            bias: operands
                .bias
                .filter(|_| is_needed(2))
                .map(zeros)
                .transpose()?,
        })
    }

    fn add(
        &mut self,
        operands: Operands<'_>,
        grad_logits: &Tensor,
        start: i64,
        rows: i64,
    ) -> Result<()> {
        if let Some(sum) = &mut self.bias {
            let _ = sum.f_add_(&grad_logits.f_sum_dim_intlist(
                [0i64].as_slice(),
                false,
                Kind::Float,
            )?)?;
        }
        let kind = operands.weight.kind();
        let grad_logits = grad_logits.f_to_kind(kind)?;
        if let Some(hidden) = &self.hidden {
            let _ = grad_logits.f_mm_out(&hidden.f_narrow(0, start, rows)?, operands.weight)?;
        }
        if let Some(sum) = &mut self.weight {
            let hidden = operands.hidden.f_narrow(0, start, rows)?;
            let grad_logits = grad_logits.f_transpose(0, 1)?;
            let _ = match kind {
                Kind::Float => sum.f_addmm_(&grad_logits, &hidden)?,
                _ => sum.f_add_(&grad_logits.f_mm(&hidden)?)?,
            };
        }
        Ok(())
    }

    /// In the order and kind of the inputs.
    fn finish(self, operands: Operands<'_>) -> Result<Vec<Option<Tensor>>> {
        let kind = operands.weight.kind();
        let in_kind = |sum: Option<Tensor>| sum.map(|sum| sum.f_to_kind(kind)).transpose();
        let mut result = vec![self.hidden, in_kind(self.weight)?];
        if operands.bias.is_some() {
            result.push(in_kind(self.bias)?);
        }
        Ok(result)
    }
}
