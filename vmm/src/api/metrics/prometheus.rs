//! The text format of Prometheus (version 0.0.4).

use std::collections::HashSet;
use std::fmt::Write;

use serde_json::Value;

/// A page of it.
#[derive(Debug, Default)]
pub struct Text {
    text: String,
    introduced: HashSet<String>,
}

impl Text {
    /// A value that goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.sample(name, "gauge", help, labels, value);
    }

    /// A value that only goes up.
    pub fn counter(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.sample(name, "counter", help, labels, value);
    }

    /// All numbers of a JSON object, by their place in it: those in a list have its position as a label.
    pub fn counters_of(&mut self, prefix: &str, value: &Value) {
        self.numbers(prefix, None, value);
    }

    fn numbers(&mut self, name: &str, place: Option<&str>, value: &Value) {
        match value {
            Value::Number(number) => {
                let labels: Vec<_> = place.iter().map(|place| ("index", *place)).collect();
                let help = "counted by the machine's devices since it started";
                let value = number.as_u64().unwrap_or(0);
                self.counter(&format!("{name}_total"), help, &labels, value);
            }
            Value::Object(fields) => {
                for (field, value) in fields {
                    self.numbers(&format!("{name}_{field}"), place, value);
                }
            }
            Value::Array(items) => {
                // Samples of one name stand together: field by field, not item by item.
                let Some(Value::Object(first)) = items.first() else { return };
                for field in first.keys() {
                    for (place, item) in items.iter().enumerate() {
                        let place = place.to_string();
                        self.numbers(&format!("{name}_{field}"), Some(&place), &item[field]);
                    }
                }
            }
            _ => {}
        }
    }

    fn sample(&mut self, name: &str, kind: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        if self.introduced.insert(name.into()) {
            let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        }
        self.text.push_str(name);
        if !labels.is_empty() {
            let labels: Vec<_> =
                labels.iter().map(|(label, value)| format!("{label}={value:?}")).collect();
            let _ = write!(self.text, "{{{}}}", labels.join(","));
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// The page.
    pub fn into_string(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_name_stand_together_under_one_head() {
        let mut text = Text::default();
        text.gauge("state", "what it is", &[("state", "Not started")], 1);
        text.gauge("state", "what it is", &[("state", "Running")], 0);
        text.counters_of(
            "g",
            &serde_json::json!({ "ports": 3, "disks": [{"bytes": 1, "n": 2}, {"bytes": 4, "n": 5}] }),
        );
        let lines: Vec<_> = text.text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        assert_eq!(
            lines,
            [
                "# TYPE state gauge",
                "state{state=\"Not started\"} 1",
                "state{state=\"Running\"} 0",
                "# TYPE g_disks_bytes_total counter",
                "g_disks_bytes_total{index=\"0\"} 1",
                "g_disks_bytes_total{index=\"1\"} 4",
                "# TYPE g_disks_n_total counter",
                "g_disks_n_total{index=\"0\"} 2",
                "g_disks_n_total{index=\"1\"} 5",
                "# TYPE g_ports_total counter",
                "g_ports_total 3",
            ]
        );
    }
}
