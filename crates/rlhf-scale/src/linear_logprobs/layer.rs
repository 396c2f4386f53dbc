//! The arithmetic: forward and backward of one chunk of tokens after another.

use tch::{Device, Kind, Tensor};

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
            let scores = chunk_scores(self, operands, &mut buffers, (start, rows), false)?;
            rows_of(&logprobs)?.f_copy_(&scores.logprobs)?;
            rows_of(&normalizers)?.f_copy_(&scores.maxima.f_add(&scores.log_sums)?)?;
            if let (Some(all), Some(chunk)) = (&entropy, &scores.entropy) {
                rows_of(all)?.f_copy_(chunk)?;
            }
            if let Some(directions) = &directions {
                // (W[id] - p W) / temperature
                let kind = operands.weight.kind();
                let mut exponentials = scores.exponentials;
                let probabilities = exponentials.f_div_(&scores.sums)?.f_to_kind(kind)?;
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
    pub(super) fn chunks(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let (tokens, step) = (self.ids.size()[0], self.chunk_rows);
        (0..tokens)
            .step_by(step as usize)
            .map(move |start| (start, step.min(tokens - start)))
    }
}

/// A chunk's logits `z` and what follows from them.
pub(super) struct ChunkScores {
    /// `[rows, V]`, `z - max z`; without entropy overwritten by the exponentials.
    logits: Tensor,
    /// `[rows, V]`, of `z - max z`.
    exponentials: Tensor,
    /// `[rows, 1]`, like all that follow: the largest logits.
    maxima: Tensor,
    /// Of the exponentials.
    pub(super) sums: Tensor,
    log_sums: Tensor,
    pub(super) logprobs: Tensor,
    /// If there is a second buffer.
    pub(super) entropy: Option<Tensor>,
    /// `[rows, V]`: that of the cap, if it was asked for and there is one.
    slope: Option<Tensor>,
}

/// Runs under `no_grad`. The result lies in the buffers.
pub(super) fn chunk_scores(
    layer: &OutputLayer,
    operands: Operands<'_>,
    buffers: &mut Buffers,
    (start, rows): (i64, i64),
    with_slope: bool,
) -> Result<ChunkScores> {
    let ids = layer.ids.f_narrow(0, start, rows)?.f_unsqueeze(1)?;
    // Relative to the maximum, so that the exponentials do not overflow.
    let mut logits = buffers.logits(operands, start, rows)?;
    let slope = match with_slope {
        true => layer.slope(&logits)?,
        false => None,
    };
    let maxima = logits.f_amax([-1i64].as_slice(), true)?;
    let _ = logits.f_sub_(&maxima)?;
    let chosen = logits.f_gather(1, &ids, false)?;
    let exponentials = match &buffers.second {
        Some(second) => logits.f_exp_out(&second.f_narrow(0, 0, rows)?)?,
        None => logits.f_exp_()?,
    };
    let sums = exponentials.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
    let log_sums = sums.f_log()?;
    let entropy = match &buffers.second {
        Some(_) => {
            // log Σ e^z - Σ p z; a row's product with a row, without a tensor for its terms.
            let products = logits
                .f_unsqueeze(1)?
                .f_bmm(&exponentials.f_unsqueeze(2)?)?;
            let mean = products.f_squeeze_dim(2)?.f_div(&sums)?;
            Some(log_sums.f_sub(&mean)?)
        }
        None => None,
    };
    Ok(ChunkScores {
        logprobs: chosen.f_sub(&log_sums)?,
        logits,
        exponentials,
        maxima,
        sums,
        log_sums,
        entropy,
        slope,
    })
}

impl ChunkScores {
    /// The gradient of the logits before the temperature, in their place, from the tokens'
    /// gradients `[rows, 1]`:
    ///
    /// ```text
    /// ∂ logprob / ∂ zⱼ = [j = id] - pⱼ        ∂ entropy / ∂ zⱼ = -pⱼ (log pⱼ + entropy)
    /// ```
    pub(super) fn into_grad_logits(
        self,
        ids: &Tensor,
        temperature: f64,
        grad_logprobs: &Tensor,
        grad_entropy: Option<Tensor>,
    ) -> Result<Tensor> {
        let own = grad_logprobs.f_div_scalar(temperature)?;
        let factors = own.f_div(&self.sums)?.f_neg_()?;
        let mut exponentials = self.exponentials;
        let mut result = match (grad_entropy, &self.entropy) {
            (Some(grad), Some(entropy)) => {
                let slope = grad.f_div_scalar(-temperature)?.f_div_(&self.sums)?;
                let offset = entropy.f_sub(&self.log_sums)?.f_mul_(&slope)?;
                let offset = offset.f_add(&factors)?;
                let mut logits = self.logits;
                let _ = logits.f_mul_(&slope)?.f_add_(&offset)?;
                logits.f_mul_(&exponentials)?
            }
            _ => exponentials.f_mul_(&factors)?,
        };
        let mut result = result.f_scatter_add_(1, ids, &own)?;
        if let Some(slope) = &self.slope {
            let _ = result.f_mul_(slope)?;
        }
        Ok(result)
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
        let mut sums = Gradients::new(operands, needed, operands.hidden.kind())?;
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
pub(super) struct Buffers {
    first: Tensor,
    second: Option<Tensor>,
    temperature: f64,
    softcap: Option<f64>,
}

impl Buffers {
    pub(super) fn new(layer: &OutputLayer, operands: Operands<'_>, two: bool) -> Result<Self> {
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
pub(super) struct Gradients {
    pub(super) hidden: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Gradients {
    pub(super) fn new(operands: Operands<'_>, needed: &[bool], hidden_kind: Kind) -> Result<Self> {
        let is_needed = |i: usize| needed.get(i) == Some(&true);
        let zeros = |like: &Tensor| Tensor::f_zeros(like.size(), (Kind::Float, like.device()));
        let hidden = operands.hidden;
        Ok(Self {
            hidden: is_needed(0)
                .then(|| hidden.f_empty_like()?.f_to_kind(hidden_kind))
                .transpose()?,
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

    /// [`add`](Self::add) for logit gradients that are to be multiplied by `scale`, a f32 scalar,
    /// after their products with 16-bit operands.
    pub(super) fn add_scaled(
        &mut self,
        operands: Operands<'_>,
        grad_logits: &Tensor,
        scale: Option<&Tensor>,
        start: i64,
        rows: i64,
    ) -> Result<()> {
        let Some(scale) = scale else {
            return self.add(operands, grad_logits, start, rows);
        };
        if let Some(sum) = &mut self.bias {
            let column = grad_logits.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
            let _ = sum.f_add_(&column.f_mul(scale)?)?;
        }
        let grad_logits = grad_logits.f_to_kind(operands.weight.kind())?;
        if let Some(hidden) = &self.hidden {
            let product = grad_logits.f_mm(operands.weight)?.f_to_kind(Kind::Float)?;
            hidden
                .f_narrow(0, start, rows)?
                .f_copy_(&product.f_mul(scale)?)?;
        }
        if let Some(sum) = &mut self.weight {
            let hidden = operands.hidden.f_narrow(0, start, rows)?;
            let product = grad_logits.f_transpose(0, 1)?.f_mm(&hidden)?;
            let _ = sum.f_addcmul_(&product.f_to_kind(Kind::Float)?, scale)?;
        }
        Ok(())
    }

    /// The sums times `factor`, a scalar, in the order and kinds of the inputs.
    pub(super) fn scaled(self, factor: &Tensor, kinds: &[Kind]) -> Result<Vec<Option<Tensor>>> {
        // A host's scalar may be looked at; a device's is not waited for.
        let is_one = factor.device() == Device::Cpu && factor.f_double_value(&[])? == 1.0;
        let sums = [self.hidden, self.weight, self.bias];
        let scaled = |(sum, &kind): (Option<Tensor>, &Kind)| -> Result<Option<Tensor>> {
            let Some(mut sum) = sum else { return Ok(None) };
            if !is_one {
                sum = sum.f_mul_(&factor.f_to_device(sum.device())?)?;
            }
            Ok(Some(sum.f_to_kind(kind)?))
        };
        sums.into_iter().zip(kinds).map(scaled).collect()
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
