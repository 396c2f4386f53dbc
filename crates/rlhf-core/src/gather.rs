//! Tensors of several ranks on the first of them.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Collective, Cut, Error, Result};

/// The whole tensors, in their order, on the CPU of the first rank of those that have parts of them;
/// `None` on the others. `cut` says how a tensor is cut, and the size of the whole dimension. Every
/// rank calls it.
///
/// # Errors
/// Those of the group; libtorch's.
pub fn gather_parts(
    group: &dyn Collective,
    parts: Vec<(String, Tensor)>,
    cut: impl Fn(&str, &Tensor) -> Option<(Cut, i64)>,
) -> Result<Option<Vec<(String, Tensor)>>> {
    let first = group.rank() == 0;
    let mut whole = Vec::with_capacity(parts.len());
    for (name, part) in parts {
        let tensor = match cut(&name, &part) {
            Some((cut, size)) => cut.gather(&part, size, group)?,
            None if first => Some(part.f_detach()?.f_to_device(Device::Cpu)?),
            None => None,
        };
        whole.extend(tensor.map(|tensor| (name, tensor)));
    }
    Ok(first.then_some(whole))
}

/// The tensors of all stages on the CPU of the first, sorted by name; `None` on the others. Of those
/// that several stages have it is the first one's. Every stage calls it; `device` is where the group
/// sends from.
///
/// # Errors
/// Those of the group; libtorch's.
pub fn gather_stages(
    group: &dyn Collective,
    mut tensors: Vec<(String, Tensor)>,
    device: Device,
) -> Result<Option<Vec<(String, Tensor)>>> {
    if group.rank() > 0 {
        send_all(group, &tensors, device)?;
        return Ok(None);
    }
    for stage in 1..group.size() {
        for (name, tensor) in receive_all(group, stage, device)? {
            // A tied embedding is here already.
            if tensors.iter().all(|(known, _)| *known != name) {
                tensors.push((name, tensor));
            }
        }
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Some(tensors))
}

/// A tensor that a stage sends.
#[derive(Serialize, Deserialize)]
struct Sent {
    name: String,
    shape: Vec<i64>,
    /// Its place among the kinds.
    kind: usize,
}

/// Kinds of weights, and of what an optimiser counts.
const KINDS: [Kind; 5] = [
    Kind::Float,
    Kind::Double,
    Kind::Half,
    Kind::BFloat16,
    Kind::Int64,
];

fn send_all(group: &dyn Collective, tensors: &[(String, Tensor)], device: Device) -> Result<()> {
    let sent = |(name, tensor): &(String, Tensor)| {
        let kind = KINDS.iter().position(|kind| *kind == tensor.kind());
        let kind = kind.ok_or_else(|| {
            let kind = format!("{:?}", tensor.kind());
            Error::config("kind", kind, "cannot be sent from stage to stage")
        })?;
        Ok(Sent {
            name: name.clone(),
            shape: tensor.size(),
            kind,
        })
    };
    let list = tensors.iter().map(sent).collect::<Result<Vec<_>>>()?;
    let text = serde_json::to_vec(&list).map_err(Error::model)?;
    let length = Tensor::from_slice(&[text.len() as i64]).f_to_device(device)?;
    group.send(&length, 0)?;
    group.send(&Tensor::from_slice(&text).f_to_device(device)?, 0)?;
    for (_, tensor) in tensors {
        let tensor = tensor.f_detach()?.f_to_device(device)?.f_contiguous()?;
        group.send(&tensor, 0)?;
    }
    Ok(())
}

fn receive_all(
    group: &dyn Collective,
    stage: usize,
    device: Device,
) -> Result<Vec<(String, Tensor)>> {
    let length = Tensor::f_zeros([1], (Kind::Int64, device))?;
    group.receive(&length, stage)?;
    let length = i64::try_from(&length.f_reshape([] as [i64; 0])?)?;
    let text = Tensor::f_zeros([length], (Kind::Uint8, device))?;
    group.receive(&text, stage)?;
    let text = Vec::<u8>::try_from(&text)?;
    let list: Vec<Sent> = serde_json::from_slice(&text).map_err(Error::model)?;
    list.into_iter()
        .map(|Sent { name, shape, kind }| {
            let kind = KINDS.get(kind).copied().unwrap_or(Kind::Float);
            let tensor = Tensor::f_empty(shape.as_slice(), (kind, device))?;
            group.receive(&tensor, stage)?;
            Ok((name, tensor.f_to_device(Device::Cpu)?))
        })
        .collect()
}
