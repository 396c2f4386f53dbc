//! What a step costs on many devices, before anybody pays for them.

use super::{MeshShape, Operation, Sharding};

/// A transformer, as far as its cost goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelSize {
    /// Trained parameters.
    pub parameters: f64,
    /// Blocks.
    pub layers: f64,
    /// Width of the residual stream.
    pub hidden: f64,
}

impl ModelSize {
    /// Llama 3.2 1B.
    pub const ONE_BILLION: Self = Self {
        parameters: 1.24e9,
        layers: 16.0,
        hidden: 2048.0,
    };
    /// Llama 2 7B.
    pub const SEVEN_BILLION: Self = Self {
        parameters: 6.74e9,
        layers: 32.0,
        hidden: 4096.0,
    };
    /// Llama 2 70B.
    pub const SEVENTY_BILLION: Self = Self {
        parameters: 68.98e9,
        layers: 80.0,
        hidden: 8192.0,
    };
}

/// Devices and what joins them. Rates are of one device and one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// Multiplications and additions a second that matrix products reach.
    pub flops: f64,
    /// Bytes of memory that a step may use.
    pub memory: f64,
    /// Bytes a second to another device of the same machine.
    pub link: f64,
    /// Bytes a second to a device of another machine.
    pub network: f64,
    /// Devices of a machine.
    pub devices: usize,
}

impl Machine {
    /// Eight H100 (SXM): by their data sheet 989 TFLOP/s in bf16, of which 40% are assumed to be
    /// reached, 80 GB, of which 72 are assumed to be usable, NVLink with 450 GB/s each way, and
    /// 400 Gb/s of network for each device. Assumptions, not measurements.
    pub const EIGHT_H100: Self = Self {
        flops: 0.4 * 989e12,
        memory: 72e9,
        link: 450e9,
        network: 50e9,
        devices: 8,
    };
}

/// The batch of one optimiser step, of all devices together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepBatch {
    /// Sequences.
    pub sequences: f64,
    /// Tokens of each.
    pub tokens: f64,
    /// Sequences in a microbatch of one copy of the model.
    pub microbatch: f64,
}

/// What a device needs, and how long a step takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCost {
    /// Bytes of weights, gradients, optimiser state and activations on one device.
    pub memory: f64,
    /// Seconds of arithmetic, the pipeline's idle time included.
    pub compute_s: f64,
    /// Seconds of traffic along the data direction.
    pub data_s: f64,
    /// Seconds of traffic along the tensor direction.
    pub tensor_s: f64,
    /// Seconds of traffic between stages.
    pub pipeline_s: f64,
}

impl StepCost {
    /// Seconds of a step, when nothing overlaps: an upper bound of the model.
    pub fn step_s(&self) -> f64 {
        self.compute_s + self.data_s + self.tensor_s + self.pipeline_s
    }

    /// The cost of a step of AdamW on bf16 weights with f32 masters, every block checkpointed.
    /// `None` where the batch has no microbatch for every copy, or the layers no block for every
    /// stage.
    ///
    /// With `P` parameters, `L` layers, width `h`, `D·S·T` devices (data, stages, tensor parts),
    /// `N` tokens a step and `M` microbatches for each copy:
    ///
    /// | | |
    /// |---|---|
    /// | weights, masters and moments, sums of gradients | `(2 + 12 + 4) P/(S T)` bytes; sharded, the 12, and with gradients the 4, are divided by `D` |
    /// | activations | one microbatch's inputs of each block, `2 h` bytes a token for `L/S` blocks and up to `S` microbatches under way (1F1B), and one block's inside, `34 h / T` bytes a token (Korthikanti et al. 2022, arXiv 2205.05198, without the attention scores that a fused kernel does not keep) |
    /// | arithmetic | `8 P N` (forward, again, and twice that backward), times `(M + S − 1)/M` for the pipeline's bubble |
    /// | data | all-reduce of `4 P/(S T)` bytes; sharded gradients: reduce-scatter of them; sharded optimiser: all-gather of `2 P/(S T)` |
    /// | tensor | six all-reduces of `2 h` bytes a token for each of `L/S` blocks: two each forward, again and backward |
    /// | stages | `2 h` bytes a token, there and back |
    ///
    /// Bytes are those of [`Operation::bytes_sent`]. A direction uses the link while its ranks are
    /// neighbours within one machine ([`MeshShape::place`]), else the network.
    pub fn new(
        model: ModelSize,
        machine: &Machine,
        mesh: MeshShape,
        sharding: Sharding,
        batch: StepBatch,
    ) -> Option<Self> {
        let [data, stages, parts] = [mesh.data, mesh.pipeline, mesh.tensor].map(|n| n as f64);
        let microbatches = (batch.sequences / data / batch.microbatch).floor();
        if microbatches < 1.0 || model.layers < stages {
            return None;
        }
        let held = model.parameters / (stages * parts);
        let of_optimizer = if sharding == Sharding::Nothing {
            1.0
        } else {
            data
        };
        let of_gradients = if sharding == Sharding::Gradients {
            data
        } else {
            1.0
        };
        let state = held * (2.0 + 12.0 / of_optimizer + 4.0 / of_gradients);
        let blocks = model.layers / stages;
        let under_way = microbatches.min(stages);
        let tokens = batch.microbatch * batch.tokens;
        let activations = tokens * model.hidden * (2.0 * blocks * under_way + 34.0 / parts);

        let all_tokens = batch.sequences * batch.tokens;
        let arithmetic = 8.0 * model.parameters * all_tokens;
        let bubble = (microbatches + stages - 1.0) / microbatches;
        let compute_s = arithmetic / (machine.flops * mesh.size() as f64) * bubble;

        let sent = |operation: Operation, bytes: f64, size: usize| {
            operation.bytes_sent(bytes as u64, size) as f64
        };
        let rate = |span: usize| match span <= machine.devices {
            true => machine.link,
            false => machine.network,
        };
        let (gradients, weights) = (4.0 * held, 2.0 * held);
        let summed = match sharding {
            Sharding::Gradients => sent(Operation::ReduceScatter, gradients, mesh.data),
            _ => sent(Operation::AllReduce, gradients, mesh.data),
        };
        let gathered = match sharding {
            Sharding::Nothing => 0.0,
            _ => sent(Operation::AllGather, weights, mesh.data),
        };
        let row = 2.0 * model.hidden * all_tokens / data; // of one copy, all microbatches
        let tensor = 6.0 * blocks * sent(Operation::AllReduce, row, mesh.tensor);
        let between_stages = if mesh.pipeline > 1 {
            2.0 * row / parts
        } else {
            0.0
        };
        Some(Self {
            memory: state + activations,
            compute_s,
            data_s: (summed + gathered) / rate(mesh.tensor * mesh.data),
            tensor_s: tensor / rate(mesh.tensor),
            pipeline_s: between_stages / rate(mesh.size()),
        })
    }

    /// The fastest way to use `devices`, by this model, among meshes whose directions are powers
    /// of two; `None` if the step fits in none.
    pub fn best(
        model: ModelSize,
        machine: &Machine,
        devices: usize,
        batch: StepBatch,
    ) -> Option<(MeshShape, Sharding, Self)> {
        let powers = || (0..=devices.ilog2()).map(|power| 1usize << power);
        let mut best: Option<(MeshShape, Sharding, Self)> = None;
        for tensor in powers().filter(|tensor| *tensor <= machine.devices) {
            for pipeline in powers().filter(|stages| tensor * stages <= devices) {
                let mesh = MeshShape {
                    data: devices / tensor / pipeline,
                    pipeline,
                    tensor,
                };
                for sharding in [Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients] {
                    let Some(cost) = Self::new(model, machine, mesh, sharding, batch) else {
                        continue;
                    };
                    let faster = |(_, _, other): &(_, _, Self)| cost.step_s() < other.step_s();
                    if cost.memory <= machine.memory && best.as_ref().is_none_or(faster) {
                        best = Some((mesh, sharding, cost));
                    }
                }
            }
        }
        best
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const BATCH: StepBatch = StepBatch {
        sequences: 512.0,
        tokens: 2048.0,
        microbatch: 1.0,
    };

    fn mesh(data: usize, pipeline: usize, tensor: usize) -> MeshShape {
        MeshShape {
            data,
            pipeline,
            tensor,
        }
    }

    #[test]
    fn by_hand() {
        let model = ModelSize {
            parameters: 1e9,
            layers: 10.0,
            hidden: 1000.0,
        };
        let machine = Machine {
            flops: 1e14,
            memory: 1e11,
            link: 1e11,
            network: 1e10,
            devices: 8,
        };
        let batch = StepBatch {
            sequences: 16.0,
            tokens: 1000.0,
            microbatch: 2.0,
        };
        let cost = |mesh, sharding| StepCost::new(model, &machine, mesh, sharding, batch).unwrap();
        let close = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} is not {b}");
        // 18 bytes a parameter; 2000 tokens of 20 kB for the blocks and 34 kB inside one.
        let plain = cost(mesh(4, 1, 1), Sharding::Nothing);
        close(plain.memory, 18e9 + 2000.0 * 54e3);
        close(plain.compute_s, 8e9 * 16e3 / 4e14);
        close(plain.data_s, 1.5 * 4e9 / 1e11);
        assert_eq!((plain.tensor_s, plain.pipeline_s), (0.0, 0.0));
        let sharded = cost(mesh(4, 1, 1), Sharding::Gradients);
        close(sharded.memory, 6e9 + 2000.0 * 54e3);
        close(sharded.data_s, (3e9 + 1.5e9) / 1e11);
        // Two parts, two stages, two copies: 4 microbatches for each.
        let all = cost(mesh(2, 2, 2), Sharding::Nothing);
        close(
            all.memory,
            18e9 / 4.0 + 2000.0 * 1000.0 * (2.0 * 5.0 * 2.0 + 17.0),
        );
        close(all.compute_s, 8e9 * 16e3 / 8e14 * 5.0 / 4.0);
        close(all.tensor_s, 6.0 * 5.0 * 16e6 / 1e11);
        close(all.pipeline_s, 2.0 * 16e6 / 2.0 / 1e11);
        assert!(StepCost::new(model, &machine, mesh(16, 1, 1), Sharding::Nothing, batch).is_none());
        assert!(StepCost::new(model, &machine, mesh(1, 16, 1), Sharding::Nothing, batch).is_none());
    }

    #[test]
    fn what_does_not_fit_is_cut() {
        let machine = Machine::EIGHT_H100;
        let best = |model, devices| StepCost::best(model, &machine, devices, BATCH);
        let (one, _, _) = best(ModelSize::ONE_BILLION, 8).unwrap();
        assert_eq!(one, mesh(8, 1, 1));
        // 70B: 18 bytes a parameter are 1240 GB, more than eight have.
        assert!(best(ModelSize::SEVENTY_BILLION, 8).is_none());
        let (seventy, _, cost) = best(ModelSize::SEVENTY_BILLION, 64).unwrap();
        assert!(seventy.tensor * seventy.pipeline > 1, "{seventy:?}");
        assert!(cost.memory <= machine.memory);
    }

    /// The table of docs/distributed.md is what this code says.
    #[test]
    fn the_table_of_the_guide() {
        let guide = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/distributed.md");
        let guide = std::fs::read_to_string(guide).unwrap();
        let models = [
            ("1B", ModelSize::ONE_BILLION),
            ("7B", ModelSize::SEVEN_BILLION),
            ("70B", ModelSize::SEVENTY_BILLION),
        ];
        for (name, model) in models {
            for devices in [8, 64, 512] {
                let row = match StepCost::best(model, &Machine::EIGHT_H100, devices, BATCH) {
                    None => format!("| {name} | {devices} | does not fit | | | | |"),
                    Some((mesh, sharding, cost)) => format!(
                        "| {name} | {devices} | {} x {} x {} | {} | {:.0} GB | {:.2} s | {:.0}% |",
                        mesh.data,
                        mesh.pipeline,
                        mesh.tensor,
                        match sharding {
                            Sharding::Nothing => "nothing",
                            Sharding::Optimizer => "optimizer",
                            Sharding::Gradients => "gradients",
                        },
                        cost.memory / 1e9,
                        cost.step_s(),
                        100.0 * (1.0 - cost.compute_s / cost.step_s()),
                    ),
                };
                assert!(guide.contains(&row), "docs/distributed.md lacks:\n{row}");
            }
        }
    }
}
