//! Draws the metrics of a run.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use serde_json::Value;

/// One panel: its title and the metrics drawn in it.
pub type Panel<'a> = (&'a str, &'a [&'a str]);

const COLOURS: [RGBColor; 4] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
];

/// Draws one panel under the other from the `phase` lines of a `metrics.jsonl`. Curves are
/// smoothed by a running mean over `window` steps.
pub fn draw(
    metrics: &Path,
    phase: &str,
    panels: &[Panel<'_>],
    window: usize,
    out: &Path,
) -> Result<(), Box<dyn Error>> {
    let lines = read_phase(metrics, phase)?;
    let height = 220 * panels.len() as u32;
    let root = SVGBackend::new(out, (760, height)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (title, keys)) in root.split_evenly((panels.len(), 1)).iter().zip(panels) {
        let curves: Vec<(&str, Vec<(f64, f64)>)> = keys
            .iter()
            .map(|key| (*key, smoothed(&lines, key, window)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let all = || curves.iter().flat_map(|(_, points)| points);
        let Some((first, last)) = range(all().map(|p| p.0)) else {
            continue;
        };
        let Some((low, high)) = range(all().map(|p| p.1)) else {
            continue;
        };
        let margin = ((high - low) * 0.08).max(1e-6);
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(26)
            .y_label_area_size(60)
            .build_cartesian_2d(first..last.max(first + 1.0), low - margin..high + margin)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("step")
            .draw()?;
        for ((key, points), colour) in curves.iter().zip(COLOURS.iter().cycle()) {
            let colour = *colour;
            chart
                .draw_series(LineSeries::new(
                    points.iter().copied(),
                    colour.stroke_width(2),
                ))?
                .label(*key)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

fn read_phase(metrics: &Path, phase: &str) -> Result<Vec<Value>, Box<dyn Error>> {
    let text = std::fs::read_to_string(metrics)?;
    let mut lines = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line)?;
        if line["phase"] == phase {
            lines.push(line);
        }
    }
    Ok(lines)
}

fn smoothed(lines: &[Value], key: &str, window: usize) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = lines
        .iter()
        .filter_map(|line| {
            let value = line.get(key).or_else(|| line["stats"].get(key))?;
            Some((line["step"].as_f64()?, value.as_f64()?))
        })
        .collect();
    (0..points.len())
        .map(|i| {
            let part = &points[i.saturating_sub(window - 1)..=i];
            let mean = part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64;
            (points[i].0, mean)
        })
        .collect()
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values
        .filter(|v| v.is_finite())
        .fold(None, |range, v| match range {
            None => Some((v, v)),
            Some((low, high)) => Some((v.min(low), v.max(high))),
        })
}
