//! What a reward model of summaries learns from.

use std::error::Error;
use std::sync::Arc;

use rlhf::core::Sequence;
use rlhf::reward::Ranking;

use super::task::{Pair, SummaryTask};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// For each text, the human summary before one that the model wrote, before its own first half,
/// and before human summaries of other texts: to be liked, a summary must read well, be whole and
/// fit its text.
///
/// Every human summary is also among the worse answers of other texts, so that it cannot be liked
/// for itself; and what is compared is about as long, so that length decides nothing. `samples`
/// are the model's, several neighbours for each text, of which the one nearest in length is used.
pub fn rankings(task: &SummaryTask, texts: &[Pair], samples: &[Sequence]) -> Result<Vec<Ranking>> {
    let human = human_summaries(task, texts)?;
    let mut by_length: Vec<usize> = (0..human.len()).collect();
    by_length.sort_by_key(|&i| human[i].len());
    let several = samples.len() / texts.len().max(1);
    let mut rankings = Vec::with_capacity(texts.len());
    for (place, &i) in by_length.iter().enumerate() {
        let distance = |s: &&Sequence| s.response.len().abs_diff(human[i].len());
        let own = samples[i * several..(i + 1) * several]
            .iter()
            .min_by_key(distance)
            .ok_or("a text without a sample")?;
        let words = human[i].len() - 1;
        let half = [&human[i][..words.div_ceil(2)], &[task.stop()]].concat();
        let mut answers = vec![human[i].clone(), own.response.clone(), half];
        for step in [1, 4] {
            answers.push(human[by_length[(place + step) % human.len()]].clone());
        }
        rankings.push(Ranking {
            prompt: Arc::clone(&own.prompt),
            ranks: (0..answers.len()).map(|k| u32::from(k > 0)).collect(),
            answers,
            weight: 1.0,
        });
    }
    Ok(rankings)
}

/// For each text, the human summary before the one that the model wrote. Texts for which the model
/// wrote what the person did are left out, since there is nothing to compare.
pub fn comparisons(task: &SummaryTask, texts: &[Pair], own: Vec<Sequence>) -> Result<Vec<Ranking>> {
    let human = human_summaries(task, texts)?;
    Ok(human
        .into_iter()
        .zip(own)
        .map(|(human, own)| Ranking::best_first(own.prompt, vec![human, own.response]))
        .filter(|ranking| !ranking.comparisons().is_empty())
        .collect())
}

fn human_summaries(task: &SummaryTask, texts: &[Pair]) -> Result<Vec<Vec<i64>>> {
    texts
        .iter()
        .map(|pair| task.response(&pair.summary))
        .collect()
}
