//! Rows of /proc/interrupts that have a name instead of a number, such as `NMI:  1  0   Non-maskable interrupts`.

/// The counts of a row, one for each processor that is on; `None` if there is no such row.
pub fn row(table: &str, name: &str) -> Option<Vec<u64>> {
    let words = |line: &'_ str| {
        let (head, tail) = line.split_once(':')?;
        (head.trim() == name).then(|| tail.to_string())
    };
    let tail = table.lines().find_map(words)?;
    Some(tail.split_whitespace().map_while(|word| word.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::row;

    const TABLE: &str = "            CPU0       CPU1       
   4:         12          0   IO-APIC   4-edge      ttyS0
 NMI:          3          1   Non-maskable interrupts
 PMI:          2          0   Performance monitoring interrupts
 ERR:          0
";

    #[test]
    fn rows_are_found_by_name_with_a_count_for_each_processor() {
        assert_eq!(row(TABLE, "NMI"), Some(vec![3, 1]));
        assert_eq!(row(TABLE, "PMI"), Some(vec![2, 0]));
        assert_eq!(row(TABLE, "ERR"), Some(vec![0]));
        assert_eq!(row(TABLE, "MCE"), None);
    }
}
