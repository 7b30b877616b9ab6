//! Byte counts for people.

/// A byte count in the largest binary unit that keeps it above 1.
pub(crate) fn readable(bytes: u64) -> String {
    let units = [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let unit = units.into_iter().find(|(_, size)| bytes >= *size);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(unit, size)| format!("{:.1} {unit}", bytes as f64 / size as f64),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_readable() {
        assert_eq!(readable(12), "12 B");
        assert_eq!(readable(12 << 20), "12.0 MiB");
        assert_eq!(readable(3 << 40), "3.0 TiB");
    }
}
