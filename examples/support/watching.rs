//! The watch of a run, and what it has to say at the end.

use std::error::Error;
use std::sync::{Arc, Mutex};

use rlhf::ppo::{Finding, HackingWatch, WatchConfig};

/// What a watch has found so far.
pub type Findings = Arc<Mutex<Vec<Finding>>>;

/// A watch, and its findings for after the run.
pub fn watch(config: WatchConfig) -> Result<(HackingWatch, Findings), Box<dyn Error>> {
    let findings = Findings::default();
    let heard = Arc::clone(&findings);
    let watch = HackingWatch::new(config)?.on_finding(move |finding| {
        if let Ok(mut findings) = heard.lock() {
            findings.push(finding.clone());
        }
    });
    Ok((watch, findings))
}

/// Takes the findings out.
pub fn taken(findings: &Findings) -> Vec<Finding> {
    match findings.lock() {
        Ok(mut findings) => std::mem::take(&mut findings),
        Err(_) => Vec::new(),
    }
}

/// What was found, a paragraph each, in a run of so many steps; `looked_at`: what the watch had to
/// go by.
pub fn told(findings: &[Finding], (steps, window): (u64, usize), looked_at: &str) -> String {
    match findings {
        [] if steps < 2 * window as u64 => format!(
            "{steps} steps are too few for the watch, which compares the first {window} with the last"
        ),
        [] => format!("the watch saw nothing amiss in {looked_at}"),
        _ => {
            let found = findings.iter().map(|finding| format!("\n- {finding}"));
            format!(
                "what the watch saw in {looked_at}:{}",
                found.collect::<String>()
            )
        }
    }
}
