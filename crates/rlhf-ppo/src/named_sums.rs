//! Statistics that microbatches and processes add up: by name where they are made and read, and a
//! row of numbers on the way.

/// Declares a struct with a `T` for each name, and its way to an array and back.
macro_rules! named_sums {
    (
        $(#[$doc:meta])*
        $name:ident { $($(#[$field_doc:meta])* $field:ident),+ $(,)? }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Default)]
        pub(crate) struct $name<T> {
            $($(#[$field_doc])* pub(crate) $field: T),+
        }

        impl<T> $name<T> {
            pub(crate) const COUNT: usize = [$(stringify!($field)),+].len();

            pub(crate) fn into_array(self) -> [T; [$(stringify!($field)),+].len()] {
                [$(self.$field),+]
            }

            fn from_array([$($field),+]: [T; [$(stringify!($field)),+].len()]) -> Self {
                Self { $($field),+ }
            }
        }

        impl $name<f64> {
            /// The sums by their names.
            pub(crate) fn from_sums(sums: Vec<f64>) -> rlhf_core::Result<Self> {
                let sums = sums.try_into().map_err(|sums: Vec<f64>| {
                    rlhf_core::Error::LengthMismatch {
                        left: "the statistics of a minibatch",
                        left_len: sums.len(),
                        right: "their names",
                        right_len: Self::COUNT,
                    }
                })?;
                Ok(Self::from_array(sums))
            }
        }
    };
}
pub(crate) use named_sums;
