//! Tokens of a model whose blocks are spread over stages: the last chooses, all write.

use tch::{Device, Tensor};

use super::rows::Chosen;
use crate::{Error, KeptSet, PipelineStage, Result};

/// Numbers before those of the rows: whether choosing failed, and how many bytes follow.
const HEADER: usize = 2;
/// Numbers of a row: its token and the two log-probabilities.
const ROW: usize = 3;

/// What the last stage has chosen for so many rows, in every stage; `own` is there in the last.
///
/// One message of `8 (2 + 3 rows)` bytes; where it is noted what tokens were drawn from, or choosing
/// failed, a second one.
pub(super) fn chosen_by_last(
    stage: &PipelineStage,
    rows: usize,
    own: Option<Result<Vec<Chosen>>>,
) -> Result<Vec<Chosen>> {
    let (numbers, more) = match &own {
        Some(own) => message(own)?,
        None => (Vec::new(), Vec::new()),
    };
    let mut numbers = numbers;
    numbers.resize(HEADER + ROW * rows, 0.0);
    let tensor = Tensor::from_slice(&numbers).f_to_device(stage.device)?;
    stage.tell(&tensor)?;
    if let Some(own) = own {
        let length = more.len();
        stage.bytes_of_last(more, length)?;
        return own;
    }
    let numbers = Vec::<f64>::try_from(tensor.f_to_device(Device::Cpu)?)?;
    let more = stage.bytes_of_last(more, numbers[1] as usize)?;
    if numbers[0] > 0.0 {
        return Err(Error::Peer {
            rank: stage.group.size() - 1,
            message: String::from_utf8_lossy(&more).into_owned(),
        });
    }
    let mut kept: Vec<Option<KeptSet>> = match more.is_empty() {
        true => Vec::new(),
        false => serde_json::from_slice(&more).map_err(Error::model)?,
    };
    kept.resize(rows, None);
    let rows = numbers[HEADER..].chunks_exact(ROW).zip(kept);
    Ok(rows
        .map(|(row, kept)| Chosen {
            id: row[0] as i64,
            sampling_logprob: row[1] as f32,
            policy_logprob: row[2] as f32,
            kept,
        })
        .collect())
}

fn message(own: &Result<Vec<Chosen>>) -> Result<(Vec<f64>, Vec<u8>)> {
    let chosen = match own {
        Ok(chosen) => chosen,
        Err(error) => {
            let text = error.to_string().into_bytes();
            return Ok((vec![1.0, text.len() as f64], text));
        }
    };
    let kept: Vec<&Option<KeptSet>> = chosen.iter().map(|chosen| &chosen.kept).collect();
    let more = match kept.iter().any(|kept| kept.is_some()) {
        true => serde_json::to_vec(&kept).map_err(Error::model)?,
        false => Vec::new(),
    };
    let mut numbers = vec![0.0, more.len() as f64];
    for chosen in chosen {
        // f64 holds all of them without rounding.
        numbers.extend([
            chosen.id as f64,
            f64::from(chosen.sampling_logprob),
            f64::from(chosen.policy_logprob),
        ]);
    }
    Ok((numbers, more))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::stage::testing::on_stages;

    fn chosen(id: i64, kept: Option<KeptSet>) -> Chosen {
        Chosen {
            id,
            sampling_logprob: -0.1 * id as f32,
            policy_logprob: f32::NAN,
            kept,
        }
    }

    #[test]
    fn the_last_stage_tells_what_it_has_chosen() {
        for kept in [None, Some(KeptSet::Only([3, 700].into()))] {
            let heard = on_stages(|rank, stage| {
                let own = || Ok(vec![chosen(3, kept.clone()), chosen(700, kept.clone())]);
                chosen_by_last(&stage, 2, (rank == 1).then(own)).unwrap()
            });
            for rows in heard {
                assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), [3, 700]);
                assert_eq!(rows[1].sampling_logprob, -0.1 * 700f32);
                assert!(rows[0].policy_logprob.is_nan());
                assert!(rows.iter().all(|row| row.kept == kept));
            }
        }
    }

    #[test]
    fn the_last_stage_tells_why_it_has_not() {
        let errors = on_stages(|rank, stage| {
            let own = || Err(Error::config("a", 1, "b"));
            chosen_by_last(&stage, 5, (rank == 1).then(own))
                .err()
                .unwrap()
        });
        assert!(matches!(&errors[1], Error::InvalidConfig { .. }));
        assert!(
            matches!(&errors[0], Error::Peer { rank: 1, message } if *message == errors[1].to_string())
        );
    }
}
