//! What a worker tells of its health, every other second.

use serde::Serialize;

use super::events::Software;

/// The fields of `worker-online`, `worker-heartbeat` and `worker-offline`.
#[derive(Debug, Serialize)]
pub struct Heartbeat<'a> {
    /// Seconds between heartbeats.
    pub freq: f64,
    /// Tasks that run.
    pub active: usize,
    /// Tasks that were started so far.
    pub processed: u64,
    /// Load of the machine over 1, 5 and 15 minutes.
    pub loadavg: [f64; 3],
    /// What the worker is.
    #[serde(flatten)]
    pub software: &'a Software,
}

/// The fields of the heartbeat that remote control asks for.
#[derive(Debug, Serialize)]
pub struct Asked<'a> {
    /// Seconds until the next one is due, as Celery says here.
    pub freq: u32,
    /// What the worker is.
    #[serde(flatten)]
    pub software: &'a Software,
}

/// Load of the machine, to two digits; zeros where the system does not tell.
pub fn load_average() -> [f64; 3] {
    std::fs::read_to_string("/proc/loadavg").ok().and_then(|text| read(&text)).unwrap_or_default()
}

fn read(text: &str) -> Option<[f64; 3]> {
    let mut numbers = text.split_whitespace().map(|word| word.parse::<f64>().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next()??])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_is_read_as_the_kernel_writes_it() {
        assert_eq!(read("0.25 1.50 12.00 2/345 6789\n"), Some([0.25, 1.5, 12.0]));
        assert_eq!(read("0.25 1.50"), None);
    }

    #[test]
    fn the_fields_are_those_that_monitors_read() {
        let software =
            Software { sw_ident: "py-celery".into(), sw_ver: "5.7.0".into(), sw_sys: "Linux".into() };
        let heartbeat =
            Heartbeat { freq: 2.0, active: 1, processed: 9, loadavg: [0.5, 0.25, 0.0], software: &software };
        assert_eq!(
            serde_json::to_string(&heartbeat).unwrap(),
            r#"{"freq":2.0,"active":1,"processed":9,"loadavg":[0.5,0.25,0.0],"sw_ident":"py-celery","sw_ver":"5.7.0","sw_sys":"Linux"}"#
        );
    }
}
