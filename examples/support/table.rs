//! Tables of figures, one column a state of the policy.

use std::fmt::{self, Write};

/// Name, decimals, and a figure a column.
pub type Row<'a, const N: usize> = (&'a str, usize, [f64; N]);

/// A line for the columns, and one a row.
pub fn table<const N: usize>(
    columns: [&str; N],
    rows: &[Row<'_, N>],
) -> Result<String, fmt::Error> {
    let mut text = format!("{:<NAME$}", "");
    for column in columns {
        write!(text, "{column:>FIGURE$}")?;
    }
    for (name, decimals, figures) in rows {
        write!(text, "\n{name:<NAME$}")?;
        for figure in figures {
            write!(text, "{figure:>FIGURE$.decimals$}")?;
        }
    }
    Ok(text)
}

const NAME: usize = 46;
const FIGURE: usize = 9;
