//! The table and the summary file.

use std::path::Path;

use serde_json::json;

use crate::contest::{Figures, Side};
use crate::roofline::Decoding;
use crate::{Dtype, Result, Task, Work};

impl Side {
    pub(crate) fn step_s(&self) -> f64 {
        median(&self.seconds)
    }

    fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.seconds.iter().sum::<f64>()
    }
}

impl Figures {
    /// Seconds that a step takes at the measured rates: its products, and where it decodes the
    /// longer of reading the weights and multiplying them.
    fn floor_s(&self) -> f64 {
        let gemm = median(&self.gemm_rates);
        let of = |pick: fn(&Decoding) -> f64| {
            let values: Vec<f64> = self.ours.decoding.iter().map(pick).collect();
            median(&values)
        };
        let reading = of(|d| d.bytes) / median(&self.bandwidths);
        median(&self.ours.flops) / gemm + reading.max(of(|d| d.flops) / gemm)
    }

    fn roofline_share(&self) -> f64 {
        self.floor_s() / self.ours.step_s()
    }

    /// Median over the turns, each of which compares two neighbours in time.
    fn speedup(&self) -> Option<f64> {
        let peer = self.peer.as_ref()?;
        let ratios: Vec<f64> = peer
            .seconds
            .iter()
            .zip(&self.ours.seconds)
            .map(|(theirs, ours)| theirs / ours)
            .collect();
        Some(median(&ratios))
    }
}

pub(crate) fn print(work: &Work, figures: &Figures) -> Result<()> {
    let ours = &figures.ours;
    let dtype = match work.dtype {
        Dtype::Float32 => "f32",
        Dtype::Bfloat16 if matches!(work.task, Task::Generate | Task::Greedy) => "bf16",
        Dtype::Bfloat16 => "bf16 (the peer: f32 weights under autocast)",
    };
    let task = serde_json::to_value(work.task)?;
    println!(
        "{}, {dtype}, {} {} a step, {} threads, {}\n",
        task.as_str().unwrap_or_default(),
        work.batch,
        work.task.items(),
        work.threads,
        work.model.display()
    );
    println!("| | s a step (least to greatest) | tokens/s | peak MB | start-up s |");
    println!("|---|---|---|---|---|");
    for side in figures.peer.iter().chain([ours]) {
        let (least, greatest) = range(&side.seconds);
        println!(
            "| {} | {:.3} ({least:.3} to {greatest:.3}) | {:.0} | {:.0} | {:.1} |",
            side.versions,
            side.step_s(),
            side.tokens_per_s(),
            side.peak_mb,
            median(&side.start_s)
        );
    }
    if let (Some(peer), Some(speedup)) = (&figures.peer, figures.speedup()) {
        println!(
            "\n{speedup:.2} times as quick (median over {} turns), {:.2} of the memory; both sides read the same ids",
            ours.seconds.len(),
            ours.peak_mb / peer.peak_mb
        );
    }
    println!(
        "\n{:.0} GFLOP a step at the {:.0} GFLOP/s of its widest layer, {:.1} GB of weights decoded with at {:.0} GB/s: {:.3} s at \
         least, {:.0}% of the floor reached",
        median(&ours.flops) / 1e9,
        median(&figures.gemm_rates) / 1e9,
        ours.decoding.first().map_or(0.0, |d| d.bytes) / 1e9,
        median(&figures.bandwidths) / 1e9,
        figures.floor_s(),
        100.0 * figures.roofline_share()
    );
    Ok(())
}

pub(crate) fn write(work: &Work, figures: &Figures, path: &Path) -> Result<()> {
    let ours = &figures.ours;
    let peer = figures.peer.as_ref();
    let summary = json!({
        "task": work.task,
        "dtype": work.dtype,
        "batch": work.batch,
        "ours_s": ours.step_s(),
        "peer_s": peer.map(Side::step_s),
        "speedup": figures.speedup(),
        "ours_peak_mb": ours.peak_mb,
        "peer_peak_mb": peer.map(|p| p.peak_mb),
        "memory_ratio": peer.map(|p| ours.peak_mb / p.peak_mb),
        "roofline_share": figures.roofline_share(),
        "floor_s": figures.floor_s(),
        "bandwidth_gb_s": median(&figures.bandwidths) / 1e9,
        "gemm_gflops": median(&figures.gemm_rates) / 1e9,
        "ours_tokens_per_s": ours.tokens_per_s(),
        "peer_tokens_per_s": peer.map(Side::tokens_per_s),
        "ours_start_s": median(&ours.start_s),
        "peer_start_s": peer.map(|p| median(&p.start_s)),
        "turns": ours.seconds.len(),
        "threads": work.threads,
        "ours": ours.versions,
        "peer": peer.map(|p| p.versions.as_str()),
    });
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, format!("{summary:#}\n"))?;
    println!("\n{}", path.display());
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

fn range(values: &[f64]) -> (f64, f64) {
    values.iter().fold(
        (f64::INFINITY, f64::NEG_INFINITY),
        |(least, greatest), &v| (least.min(v), greatest.max(v)),
    )
}
