//! Several processes that train one model.

use std::fmt::Display;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// What processes that train one model need to talk: `rlhf_scale::distributed` has one.
pub trait Exchange: Send + Sync {
    /// This process among all, from 0.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn size(&self) -> usize;

    /// What every rank hands in, by rank. All ranks call it, in the same order.
    ///
    /// # Errors
    /// If a rank is gone, or does not come in time.
    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;
}

/// The processes that train a model together, each with a copy of it.
///
/// All of them run the same program on the same data with the same seeds, and take the same steps.
/// What costs is dealt out: the microbatches of an update, the prompts of a rollout, the judging
/// of its answers, in contiguous [shares](Self::share). What comes of it and is small (tokens,
/// scores, log-probabilities) goes to everybody, so that everything else (advantages, statistics,
/// decisions) is computed everywhere alike, and the same as by one process alone.
///
/// One process alone is the default, for which everything here is nothing.
///
/// Where a copy of the model lies on several processes, those that have the same part of it are
/// replicas of each other, and all processes together are the [run](Self::in_run), whose first writes
/// files and prints.
///
/// ```
/// use rlhf_core::Replicas;
///
/// let replicas = Replicas::current(); // of this process: here, it is alone
/// assert_eq!((replicas.rank(), replicas.size(), replicas.share(10)), (0, 1, 0..10));
/// if replicas.is_first() {
///     println!("only one process of a run says this");
/// }
/// ```
#[derive(Clone, Default)]
pub struct Replicas {
    /// Those with other data.
    copies: Option<Arc<dyn Exchange>>,
    /// All processes, where those are more.
    run: Option<Arc<dyn Exchange>>,
}

static CURRENT: RwLock<Replicas> = RwLock::new(Replicas::alone());

impl Replicas {
    /// One process.
    pub const fn alone() -> Self {
        Self {
            copies: None,
            run: None,
        }
    }

    /// The processes that `exchange` joins.
    pub fn of(exchange: Arc<dyn Exchange>) -> Self {
        Self {
            copies: (exchange.size() > 1).then_some(exchange),
            run: None,
        }
    }

    /// These, in a run of more processes: those of other parts of the model, too.
    #[must_use]
    pub fn in_run(self, run: Arc<dyn Exchange>) -> Self {
        Self {
            run: (run.size() > 1).then_some(run),
            ..self
        }
    }

    /// Those that this process is one of, for every trainer that is made from now on: see
    /// [`make_current`](Self::make_current).
    pub fn current() -> Self {
        CURRENT
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Makes them what [`current`](Self::current) returns.
    pub fn make_current(&self) {
        *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = self.clone();
    }

    /// This process among them, from 0.
    pub fn rank(&self) -> usize {
        self.copies.as_ref().map_or(0, |exchange| exchange.rank())
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.copies.as_ref().map_or(1, |exchange| exchange.size())
    }

    /// This process among all of the run, from 0.
    pub fn run_rank(&self) -> usize {
        self.run().map_or(0, |run| run.rank())
    }

    /// All processes of the run.
    pub fn run_size(&self) -> usize {
        self.run().map_or(1, |run| run.size())
    }

    fn run(&self) -> Option<&dyn Exchange> {
        self.run
            .as_ref()
            .or(self.copies.as_ref())
            .map(AsRef::as_ref)
    }

    /// Whether this is the process that writes files and prints: the first of the run.
    pub fn is_first(&self) -> bool {
        self.run_rank() == 0
    }

    /// This process's part of `items`: the shares are contiguous, in the order of the ranks, and
    /// differ by at most one.
    pub fn share(&self, items: usize) -> Range<usize> {
        let (rank, size) = (self.rank(), self.size());
        let start = |rank: usize| rank * (items / size) + rank.min(items % size);
        start(rank)..start(rank + 1)
    }

    /// How large microbatches should be for every process to have one, where there are enough
    /// items: at most `most`, at least 1.
    pub fn microbatch_size(&self, items: usize, most: usize) -> usize {
        match self.size() {
            1 => most,
            size => most.min(items.div_ceil(size)).max(1),
        }
    }

    /// What every process hands in, by rank. If one hands in an error, all get one: that process
    /// its own, the others [`Error::Peer`], naming it.
    ///
    /// # Errors
    /// Those that were handed in, and those of the [`Exchange`].
    pub fn exchange<E>(&self, own: Result<Vec<u8>, E>) -> Result<Vec<Vec<u8>>, E>
    where
        E: From<Error> + Display,
    {
        exchanged(self.copies.as_ref().map(AsRef::as_ref), own)
    }

    /// What the first process of the run says, in all of them. Judges need not be functions of what
    /// they judge, and all processes must go on with the same numbers. The others are asked too where
    /// `everywhere` says so, and fail if one does.
    ///
    /// # Errors
    /// Those of `ask`, anywhere; those of the [`Exchange`].
    pub fn numbers_of_the_first<E>(
        &self,
        everywhere: bool,
        ask: impl FnOnce() -> Result<Vec<f64>, E>,
    ) -> Result<Vec<f64>, E>
    where
        E: From<Error> + Display,
    {
        if self.run().is_none() {
            return ask();
        }
        let own = match everywhere || self.is_first() {
            true => ask(),
            false => Ok(Vec::new()),
        };
        let bytes = own.map(|numbers| numbers.iter().flat_map(|n| n.to_le_bytes()).collect());
        let all = exchanged(self.run(), bytes)?;
        let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().unwrap_or_default());
        let first = all.first().ok_or_else(nothing)?;
        Ok(first.chunks_exact(8).map(number).collect())
    }

    /// Lets all processes of the run go on, or none: fails everywhere if `own` is an error somewhere.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    pub fn agree<T, E: From<Error> + Display>(&self, own: Result<T, E>) -> Result<T, E> {
        if self.run().is_none() {
            return own;
        }
        let mut kept = None;
        let handed_in = own.map(|value| {
            kept = Some(value);
            Vec::new()
        });
        exchanged(self.run(), handed_in)?;
        // Handed in as good, so it was kept.
        kept.ok_or_else(|| {
            let message = "its result is gone".to_string();
            E::from(Error::Peer {
                rank: self.run_rank(),
                message,
            })
        })
    }

    /// Puts rows together that were dealt out by [`share`](Self::share): `[Σ rows, ...]`, on the
    /// CPU. `None` from a process that had none.
    ///
    /// # Shapes
    /// Equal but for the first dimension, of one kind: f32, f64, i64 or bool.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange); [`Error::Empty`] if nobody has a row.
    pub fn gather_rows<E>(&self, own: Result<Option<Tensor>, E>) -> Result<Tensor, E>
    where
        E: From<Error> + Display,
    {
        let own = own.map(|rows| rows.map_or_else(Vec::new, |rows| vec![rows]));
        self.gather_columns(own)?.pop().ok_or_else(nothing)
    }

    /// [`gather_rows`](Self::gather_rows) for several tensors at once; none from a process that
    /// had no row. Alone, it returns them as they are.
    ///
    /// # Errors
    /// As [`gather_rows`](Self::gather_rows); none if nobody has a row.
    pub fn gather_columns<E>(&self, own: Result<Vec<Tensor>, E>) -> Result<Vec<Tensor>, E>
    where
        E: From<Error> + Display,
    {
        if self.copies.is_none() {
            return own;
        }
        let bytes = own.and_then(|tensors| Ok(encode(&tensors)?));
        let mut columns: Vec<Vec<Tensor>> = Vec::new();
        for message in self.exchange(bytes)? {
            for (column, tensor) in decode(&message)?.into_iter().enumerate() {
                match columns.get_mut(column) {
                    Some(parts) => parts.push(tensor),
                    None => columns.push(vec![tensor]),
                }
            }
        }
        let cat = |parts: &Vec<Tensor>| Tensor::f_cat(parts, 0).map_err(|e| Error::from(e).into());
        columns.iter().map(cat).collect()
    }

    /// Fails everywhere unless all processes of the run have the same `step` of a run, which they have from
    /// what they found in a folder, `field` of the configuration.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a folder that not all of them see; as
    /// [`exchange`](Self::exchange).
    pub fn check_same(&self, field: &'static str, step: u64) -> Result<()> {
        if self.run().is_none() {
            return Ok(());
        }
        let own = Ok(step.to_le_bytes().to_vec());
        let steps = exchanged::<Error>(self.run(), own)?;
        match steps.iter().all(|other| *other == step.to_le_bytes()) {
            true => Ok(()),
            false => {
                let reason = "the processes do not find the same checkpoint: share the folder";
                Err(Error::config(field, format!("(step {step})"), reason))
            }
        }
    }

    /// Sums of each number over all processes, in the order of the ranks; the same everywhere.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    pub fn sum<E: From<Error> + Display>(&self, own: Result<Vec<f64>, E>) -> Result<Vec<f64>, E> {
        if self.copies.is_none() {
            return own;
        }
        let rows = self.gather_rows(own.map(|numbers| {
            let width = numbers.len() as i64;
            Some(Tensor::from_slice(&numbers).view([1, width]))
        }))?;
        let sums = rows.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
        let sums = sums.and_then(Vec::<f64>::try_from);
        sums.map_err(|error| Error::from(error).into())
    }
}

impl std::fmt::Debug for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replicas(rank {} of {})", self.rank(), self.size())
    }
}

/// What every process of an exchange hands in: see [`Replicas::exchange`].
fn exchanged<E>(exchange: Option<&dyn Exchange>, own: Result<Vec<u8>, E>) -> Result<Vec<Vec<u8>>, E>
where
    E: From<Error> + Display,
{
    let Some(exchange) = exchange else {
        return Ok(vec![own?]);
    };
    let message = match &own {
        Ok(bytes) => [&[1], bytes.as_slice()].concat(),
        Err(error) => [&[0], error.to_string().as_bytes()].concat(),
    };
    let gathered = exchange.all_gather(&message);
    own?;
    let mut all = Vec::with_capacity(exchange.size());
    for (rank, mut message) in gathered?.into_iter().enumerate() {
        let good = message.first() == Some(&1);
        let bytes = message.split_off(message.len().min(1));
        if !good {
            let message = String::from_utf8_lossy(&bytes).into_owned();
            return Err(Error::Peer { rank, message }.into());
        }
        all.push(bytes);
    }
    Ok(all)
}

pub(crate) fn nothing<E: From<Error>>() -> E {
    Error::Empty {
        what: "what the processes were dealt out",
        help: "give them at least one item",
    }
    .into()
}

/// Kinds that are exchanged, by their place in a message.
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Int64, Kind::Bool];

pub(crate) fn encode(tensors: &[Tensor]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for tensor in tensors {
        let tensor = tensor
            .f_detach()?
            .f_to_device(Device::Cpu)?
            .f_contiguous()?;
        let kind = KINDS.iter().position(|kind| *kind == tensor.kind());
        let kind = kind.ok_or_else(|| {
            let reason = "a tensor of f32, f64, i64 or bool is needed to be exchanged";
            Error::config("kind", format!("{:?}", tensor.kind()), reason)
        })?;
        let shape = tensor.size();
        bytes.push(kind as u8);
        bytes.push(shape.len() as u8);
        bytes.extend(shape.iter().flat_map(|size| size.to_le_bytes()));
        let start = bytes.len();
        bytes.resize(
            start + tensor.numel() * tensor.kind().elt_size_in_bytes(),
            0,
        );
        tensor.f_copy_data_u8(&mut bytes[start..], tensor.numel())?;
    }
    Ok(bytes)
}

pub(crate) fn decode(mut bytes: &[u8]) -> Result<Vec<Tensor>> {
    let broken = || Error::Peer {
        rank: 0,
        message: "a message that does not hold the tensors that it says".into(),
    };
    let mut tensors = Vec::new();
    while let [kind, dims, rest @ ..] = bytes {
        let kind = *KINDS.get(*kind as usize).ok_or_else(broken)?;
        let (shape, rest) = rest
            .split_at_checked(8 * *dims as usize)
            .ok_or_else(broken)?;
        let shape: Vec<i64> = shape
            .chunks_exact(8)
            .map(|size| i64::from_le_bytes(size.try_into().unwrap_or_default()))
            .collect();
        let length = shape
            .iter()
            .try_fold(kind.elt_size_in_bytes(), |length, &size| {
                length.checked_mul(usize::try_from(size).ok()?)
            })
            .ok_or_else(broken)?;
        let (data, rest) = rest.split_at_checked(length).ok_or_else(broken)?;
        tensors.push(Tensor::f_from_data_size(data, &shape, kind)?);
        bytes = rest;
    }
    Ok(tensors)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Rank 1 of 3, whose neighbours say what they are told to.
    struct Scripted([Vec<u8>; 2]);

    impl Exchange for Scripted {
        fn rank(&self) -> usize {
            1
        }

        fn size(&self) -> usize {
            3
        }

        fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
            let [first, last] = &self.0;
            Ok(vec![first.clone(), own.to_vec(), last.clone()])
        }
    }

    fn scripted(first: &[u8], last: &[u8]) -> Replicas {
        Replicas::of(Arc::new(Scripted([first.to_vec(), last.to_vec()])))
    }

    #[test]
    fn shares_are_even_and_cover_everything() {
        let replicas = scripted(&[], &[]);
        assert_eq!(replicas.share(8), 3..6);
        assert_eq!(replicas.share(1), 1..1);
        assert_eq!(replicas.microbatch_size(8, 8), 3);
        assert_eq!(replicas.microbatch_size(100, 8), 8);
        assert_eq!(Replicas::alone().microbatch_size(3, 8), 8);
    }

    #[test]
    fn rows_come_together_in_order_and_some_may_have_none() {
        let row = encode(&[Tensor::from_slice2(&[[1f32, 2.0]])]).unwrap();
        let replicas = scripted(&[&[1], row.as_slice()].concat(), &[1]);
        let own = Tensor::from_slice2(&[[3f32, 4.0], [5.0, f32::INFINITY]]);
        let rows = replicas.gather_rows::<Error>(Ok(Some(own))).unwrap();
        assert_eq!(rows.size(), [3, 2]);
        let rows = Vec::<f32>::try_from(rows.view(-1)).unwrap();
        assert_eq!(rows, [1.0, 2.0, 3.0, 4.0, 5.0, f32::INFINITY]);
    }

    #[test]
    fn one_error_is_everybodys() {
        let replicas = scripted(&[1], b"\0out of memory");
        let error = replicas.agree::<(), Error>(Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "rank 2 failed: out of memory");
        let own = Error::config("a", 1, "b");
        let error = replicas.agree::<(), Error>(Err(own)).unwrap_err();
        assert!(matches!(error, Error::InvalidConfig { .. }));
    }

    #[test]
    fn messages_that_lie_are_errors() {
        for message in [
            vec![9, 0],
            vec![0, 1],
            vec![0, 1, 255, 255, 0, 0, 0, 0, 0, 0, 1],
        ] {
            assert!(decode(&message).is_err(), "{message:?}");
        }
    }
}
