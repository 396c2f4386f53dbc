//! A look at `tokenizer.json` before it is parsed.
//!
//! The tokenizers library keeps parts of a file as trees of values before it knows what they
//! are, which takes many times the file's size. A large file is therefore read once without
//! keeping anything: what is large in a tokenizer is a vocabulary and merges, those must have the
//! types that they should have, and the rest must be small.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Files up to this size are parsed at once: whatever they hold, it takes little memory.
const SMALL: usize = 4 << 20;
/// Values in what is neither a vocabulary nor merges; 64 bytes of text count as one.
const VALUES_LIMIT: usize = 1 << 20;

/// Fails for a large file that cannot be a tokenizer.
pub(super) fn check(json: &[u8]) -> Result<(), serde_json::Error> {
    if json.len() <= SMALL {
        return Ok(());
    }
    let mut left = VALUES_LIMIT;
    let mut parser = serde_json::Deserializer::from_slice(json);
    Part::new(Place::Root, &mut left).deserialize(&mut parser)?;
    parser.end()
}

/// Where in the file a value is, as far as it matters.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Root,
    Model,
    /// `{"token": id, …}` or `[["token", score], …]`.
    Vocabulary,
    /// `["a b", …]` or `[["a", "b"], …]`.
    Merges,
    /// An entry of one of the two, if it is an array.
    Entry,
    /// Something within an entry.
    Leaf,
    Other,
}

impl Place {
    fn field(self, name: &str) -> Self {
        match (self, name) {
            (Self::Root, "model") => Self::Model,
            (Self::Model, "vocab") => Self::Vocabulary,
            (Self::Model, "merges") => Self::Merges,
            (Self::Vocabulary, _) => Self::Leaf,
            _ => Self::Other,
        }
    }

    fn item(self) -> Self {
        match self {
            Self::Vocabulary | Self::Merges => Self::Entry,
            Self::Entry => Self::Leaf,
            _ => Self::Other,
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Root | Self::Model => "an object",
            Self::Vocabulary => "an object or array of tokens",
            Self::Merges => "an array of merges",
            Self::Entry => "a string or a pair",
            Self::Leaf => "a string or a number",
            Self::Other => "a value",
        }
    }
}

/// A value that is looked at and not kept.
struct Part<'a> {
    place: Place,
    left: &'a mut usize,
}

impl<'a> Part<'a> {
    fn new(place: Place, left: &'a mut usize) -> Self {
        Self { place, left }
    }

    fn scalar<E: Error>(self, size: usize, what: serde::de::Unexpected<'_>) -> Result<(), E> {
        match self.place {
            Place::Leaf => Ok(()),
            Place::Entry if matches!(what, serde::de::Unexpected::Str(_)) => Ok(()),
            Place::Other => match self.left.checked_sub(1 + size / 64) {
                Some(left) => {
                    *self.left = left;
                    Ok(())
                }
                None => Err(E::custom("more values than any tokenizer has")),
            },
            _ => Err(E::invalid_type(what, &self)),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.place.expected())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        match self.place {
            Place::Vocabulary | Place::Merges => Ok(()),
            _ => self.scalar(0, serde::de::Unexpected::Unit),
        }
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.scalar(0, serde::de::Unexpected::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.scalar(0, serde::de::Unexpected::Signed(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.scalar(0, serde::de::Unexpected::Unsigned(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.scalar(0, serde::de::Unexpected::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        // The error quotes what it found, which may be long.
        let start = value.get(..32).unwrap_or("a string");
        self.scalar(value.len(), serde::de::Unexpected::Str(start))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        if matches!(self.place, Place::Root | Place::Model | Place::Leaf) {
            return Err(Error::invalid_type(serde::de::Unexpected::Seq, &self));
        }
        let place = self.place.item();
        let mut count = 0;
        while items
            .next_element_seed(Part::new(place, &mut *self.left))?
            .is_some()
        {
            count += 1;
            if self.place == Place::Entry && count > 2 {
                return Err(Error::invalid_length(count, &"a pair"));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        if matches!(self.place, Place::Merges | Place::Entry | Place::Leaf) {
            return Err(Error::invalid_type(serde::de::Unexpected::Map, &self));
        }
        while let Some(name) = fields.next_key::<String>()? {
            let place = self.place.field(&name);
            fields.next_value_seed(Part::new(place, &mut *self.left))?;
        }
        Ok(())
    }
}
