//! What the operating system says of this process (Linux).

use crate::Result;

/// A size in `/proc/self/status`.
pub(crate) fn status_bytes(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(kib.ok_or("no such field")?.parse::<f64>()? * 1024.0)
}

/// Seconds that all threads have run, in user and system mode: what a step costs on a machine with
/// other work, if it has one thread.
pub(crate) fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name, in parentheses, may have spaces; times are the 14th and 15th fields.
    let (_, fields) = stat.rsplit_once(')').ok_or("no such field")?;
    let ticks: Vec<f64> = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // A hundredth of a second each, on every Linux that there is.
    Ok(ticks.iter().sum::<f64>() / 100.0)
}
