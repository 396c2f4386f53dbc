//! A reward model's report as pictures.
#![allow(dead_code, unreachable_pub)] // a module of examples, which use a part of it

use std::error::Error;
use std::path::Path;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use rlhf::reward::{Bucket, PairReport};

type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

const BLUE_LINE: RGBColor = RGBColor(31, 119, 180);
const RED_LINE: RGBColor = RGBColor(214, 39, 40);
const GREY: RGBColor = RGBColor(150, 150, 150);

/// Draws score histograms, calibration, and accuracy by length, one under the other.
pub fn draw(report: &PairReport, out: &Path) -> Result<()> {
    let root = SVGBackend::new(out, (760, 780)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((3, 1));
    histogram(report, &areas[0])?;
    calibration(report, &areas[1])?;
    by_length(report, &areas[2])?;
    root.present()?;
    Ok(())
}

fn chart<'a, 'b: 'a>(
    area: &'a Area<'b>,
    title: &str,
    x: (std::ops::Range<f64>, &str),
    y: (std::ops::Range<f64>, &str),
) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(x.0, y.0)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(x.1)
        .y_desc(y.1)
        .draw()?;
    Ok(chart)
}

fn histogram(report: &PairReport, area: &Area<'_>) -> Result<()> {
    let bins = &report.histogram;
    let (low, high) = (bins.edges[0], bins.edges[bins.edges.len() - 1]);
    let most = bins.chosen.iter().chain(&bins.rejected).max().copied();
    let top = most.unwrap_or(0).max(1) as f64 * 1.1;
    let x = (low..high.max(low + 1e-6), "score");
    let mut chart = chart(area, "scores", x, (0.0..top, "answers"))?;
    for (name, counts, colour) in [
        ("chosen", &bins.chosen, BLUE_LINE),
        ("rejected", &bins.rejected, RED_LINE),
    ] {
        let steps = counts
            .iter()
            .zip(bins.edges.windows(2))
            .flat_map(|(n, edge)| [(edge[0], *n as f64), (edge[1], *n as f64)]);
        line(&mut chart, name, steps.collect(), colour)?;
    }
    legend(&mut chart)
}

fn calibration(report: &PairReport, area: &Area<'_>) -> Result<()> {
    let title = format!(
        "calibration: expected error {:.3}",
        report.calibration_error
    );
    let (x, y) = ((0.5..1.0, "stated probability"), (0.0..1.05, "accuracy"));
    let mut chart = chart(area, &title, x, y)?;
    line(&mut chart, "perfect", vec![(0.5, 0.5), (1.0, 1.0)], GREY)?;
    let known = |bucket: &Bucket| Some((bucket.mean?, bucket.accuracy?));
    let points = report.calibration.iter().filter_map(known).collect();
    line(&mut chart, "the model", points, BLUE_LINE)?;
    legend(&mut chart)
}

fn by_length(report: &PairReport, area: &Area<'_>) -> Result<()> {
    let known = |bucket: &Bucket| Some((bucket.mean?, bucket.accuracy?));
    let points: Vec<_> = report.by_length.iter().filter_map(known).collect();
    let reach = points.iter().map(|p| p.0.abs()).fold(1.0, f64::max) * 1.1;
    let x = (-reach..reach, "tokens that the chosen answer is longer by");
    let mut chart = chart(area, "accuracy by length", x, (0.0..1.05, "accuracy"))?;
    let half = vec![(-reach, 0.5), (reach, 0.5)];
    line(&mut chart, "a coin", half, GREY)?;
    line(&mut chart, "the model", points, BLUE_LINE)?;
    legend(&mut chart)
}

fn line<'a, 'b: 'a>(
    chart: &mut Chart<'a, 'b>,
    name: &str,
    points: Vec<(f64, f64)>,
    colour: RGBColor,
) -> Result<()> {
    chart
        .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
        .label(name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    Ok(())
}

fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>) -> Result<()> {
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
