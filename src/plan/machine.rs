//! What a machine can do, as data: its devices, the links between them, and how they disturb one another.
//!
//! A machine is measured on the one at hand or written by hand for one that is not there; the planner cannot tell.
//! In a file the numbers carry their units in their names; [`super::costs`](super::costs()) is the only place that
//! turns them into seconds.

use std::collections::BTreeMap;

use serde::Serialize;

use super::read;
use crate::error::{Error, Result};
use crate::mesh::{Division, Wire};
use crate::schedule::Jitter;

/// A machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Machine {
    /// What people call it.
    pub name: String,
    /// Host cores that its software adapters share; none if that limits nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<f64>,
    /// 10⁹ bytes of weights a second that the host updates where the optimizer's state is in its memory; 1.5 if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_update_gb_s: Option<f64>,
    /// 10⁹ bytes a second that the host's memory reads and writes for all copies together; none if that limits nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_memory_gb_s: Option<f64>,
    /// `slowdown[i][j]`: how many times longer device `i` takes while device `j` is busy too, beyond what sharing
    /// `cores` explains. Empty for 1 throughout.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slowdown: Vec<Vec<f64>>,
    /// What `slowdown` and links rest on; none if nobody measured them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Evidence>,
    /// The way between two devices that `links` does not name.
    pub link: Link,
    /// Its devices. A position in this list is a device's number.
    pub devices: Vec<DeviceProfile>,
    /// Ways that differ from `link`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<LinkProfile>,
    /// What was measured of devices that divide every layer. No file holds it.
    #[serde(skip)]
    pub gangs: Vec<GangProfile>,
}

/// Devices that divide every layer, measured as one.
#[derive(Debug, Clone, PartialEq)]
pub struct GangProfile {
    /// The members' devices.
    pub devices: Vec<usize>,
    /// How they divide layers.
    pub division: Division,
    /// As what tensors travel between them.
    pub wire: Wire,
    /// What all of them together are: times of layers with their sums, threads, how the speed wanders.
    pub profile: DeviceProfile,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct DeviceProfile {
    /// The adapter's name.
    pub name: String,
    /// Driver and version; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub driver: String,
    /// The adapter of the machine at hand that it is; its own number if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<usize>,
    /// Bytes that a plan may use; none if unknown. In a file a number of bytes, or text such as `"24GiB"`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "read::write_size")]
    pub memory: Option<u64>,
    /// Bytes that one binding may hold; none if unknown.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "read::write_size")]
    pub max_binding: Option<u64>,
    /// Host cores that it keeps busy while it works: the number of its threads for a software adapter, 0 for a GPU.
    pub cores: f64,
    /// Whether copies run beside computation instead of in its queue.
    pub copy_engine: bool,
    /// How its speed wanders; not at all if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
    /// What `cores`, `jitter` and `rates` rest on; none if nobody measured them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Evidence>,
    /// How fast it is where nothing was measured.
    pub rates: Rates,
    /// What was measured on it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shapes: Vec<ShapeProfile>,
    /// Which of the [`Footprint`](super::Footprint)s of a workload are its own. It comes with the workload, so no file holds
    /// it; a device for which nobody has set it has the first.
    #[serde(skip)]
    pub kernels: usize,
}

/// Speeds that price what no measurement covers.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Rates {
    /// 10⁹ floating-point operations a second in matrix products of the sizes that occur.
    pub matmul_gflops: f64,
    /// 10⁹ bytes a second to and from its memory.
    pub memory_gb_s: f64,
    /// Microseconds that every launch of a kernel costs.
    pub launch_us: f64,
    /// Microseconds that every submission costs, which is once an action.
    pub submit_us: f64,
    /// 10⁹ bytes of weights a second that the optimizer updates. Without it: a seventh of `memory_gb_s`, because AdamW
    /// reads weight, gradient and two moments and writes three of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer_gb_s: Option<f64>,
    /// 10⁹ bytes of gradients a second that are summed for the norm. Without it: `memory_gb_s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_gb_s: Option<f64>,
    /// 10⁹ bytes of gradients a second that are cleared. Without it: `memory_gb_s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clear_gb_s: Option<f64>,
    /// Microseconds between a device's last action and the moment the host knows its sums: a read-back.
    pub barrier_us: f64,
}

/// What was measured for one shape of microbatch.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ShapeProfile {
    /// Which: equal to [`Batching::shape`](super::Batching::shape).
    pub shape: String,
    /// Microseconds that an action costs beside its layers; [`Rates::submit_us`] if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub submit_us: Option<f64>,
    /// What the times rest on; none if nobody measured them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Evidence>,
    /// Times by kind of layer.
    pub layers: BTreeMap<String, LayerProfile>,
}

/// What measured times rest on, so that better ones can take their place.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Evidence {
    /// When: seconds since the beginning of 1970, UTC.
    pub unix_seconds: u64,
    /// Steps of which the times are the mean; 0 for times that follow from those of other shapes.
    pub steps: u64,
    /// Standard deviation of a step's seconds as a part of their mean.
    pub spread: f64,
    /// The part of the host's cores that other programs took meanwhile, 0 to 1; none where the system cannot tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub others: Option<f64>,
    /// Whether the steps were those of a training run; else a probe's.
    pub trained: bool,
}

/// Seconds of one layer for one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct LayerProfile {
    /// F.
    pub forward: f64,
    /// I.
    pub input: f64,
    /// W.
    pub weight: f64,
    /// B; I + W if it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backward: Option<f64>,
}

/// The way from one device to another.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Link {
    /// Microseconds in which nothing works on a tensor.
    pub latency_us: f64,
    /// 10⁹ bytes a second of the host's copy.
    pub gb_s: f64,
    /// 10⁹ bytes a second from the sender's memory to the host; no time if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out_gb_s: Option<f64>,
    /// 10⁹ bytes a second from the host to the receiver's memory; no time if none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub into_gb_s: Option<f64>,
}

/// A [`Link`] that differs from the usual one.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct LinkProfile {
    /// The device that sends.
    pub from: usize,
    /// The device that receives.
    pub to: usize,
    /// The way.
    #[serde(flatten)]
    pub link: Link,
}

impl Machine {
    /// Reads a machine file. `place` is what errors name: the file.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::error::Error::Config) with the line of a key that is unknown (and the nearest known
    /// one), missing, of the wrong type or out of range, and of a link that names no device.
    pub fn parse(text: &str, place: &str) -> Result<Machine> {
        read::machine(text, place)
    }

    /// As a file that [`Machine::parse`] reads.
    pub fn to_toml(&self) -> String {
        // Only maps with keys that are not text, and values that TOML cannot hold, can fail; there are none.
        toml::to_string(self).unwrap_or_default()
    }

    /// The machine of these devices alone: `order[i]` is the one that is to have the number `i`.
    pub fn selected(&self, order: &[usize]) -> Machine {
        let row = |&i: &usize| order.iter().map(|&j| self.slowdown(i, j)).collect();
        let number = |device: usize| order.iter().position(|&old| old == device);
        let link = |link: &LinkProfile| {
            Some(LinkProfile { from: number(link.from)?, to: number(link.to)?, ..*link })
        };
        let gang = |gang: &GangProfile| {
            let devices = gang.devices.iter().map(|&device| number(device)).collect::<Option<_>>()?;
            Some(GangProfile { devices, ..gang.clone() })
        };
        Machine {
            gangs: self.gangs.iter().filter_map(gang).collect(),
            slowdown: if self.slowdown.is_empty() { Vec::new() } else { order.iter().map(row).collect() },
            devices: order.iter().map(|&device| self.devices[device].clone()).collect(),
            links: self.links.iter().filter_map(link).collect(),
            ..self.clone()
        }
    }

    /// The devices that a list of adapters means. A device that is named twice must be there twice.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::error::Error::Config) for an adapter that no device is, or fewer devices than are named.
    pub fn of_adapters(&self, adapters: &[usize]) -> Result<Vec<usize>> {
        let mut found: Vec<usize> = Vec::new();
        for &adapter in adapters {
            let own = |&device: &usize| self.adapter(device) == adapter;
            let all: Vec<usize> = (0..self.devices.len()).filter(own).collect();
            match all.iter().find(|device| !found.contains(device)) {
                Some(&device) => found.push(device),
                None => return Err(self.lacks(adapter, all.len())),
            }
        }
        Ok(found)
    }

    /// The adapter of the machine at hand that a device is.
    pub fn adapter(&self, device: usize) -> usize {
        self.devices[device].adapter.unwrap_or(device)
    }

    fn lacks(&self, adapter: usize, times: usize) -> Error {
        let count = self.devices.len();
        let numbers: Vec<String> = (0..count).map(|device| self.adapter(device).to_string()).collect();
        let message = match times {
            0 => {
                format!("device {adapter} does not exist: {} has {count} ({})", self.name, numbers.join(", "))
            }
            _ => format!(
                "device {adapter} is named more often than {} has it; name each of its {count} ({}) once",
                self.name,
                numbers.join(", ")
            ),
        };
        Error::config("devices", message)
    }

    /// What people call it with these of its devices alone: by its own name where they are all.
    pub fn called(&self, devices: &[usize]) -> String {
        if (0..self.devices.len()).all(|device| devices.contains(&device)) {
            return self.name.clone();
        }
        let name = |&device: &usize| self.devices[device].name.as_str();
        let mut names: Vec<(&str, usize)> = Vec::new();
        for name in devices.iter().map(name) {
            match names.iter_mut().find(|(other, _)| *other == name) {
                Some((_, times)) => *times += 1,
                None => names.push((name, 1)),
            }
        }
        let times = |(name, times): (&str, usize)| match times {
            1 => name.to_string(),
            _ => format!("{times} x {name}"),
        };
        names.into_iter().map(times).collect::<Vec<_>>().join(" + ")
    }

    /// The machine without one of its devices; those behind it move up.
    pub fn without(&self, device: usize) -> Machine {
        let others: Vec<usize> = (0..self.devices.len()).filter(|&other| other != device).collect();
        self.selected(&others)
    }

    /// The machine with other budgets; where there is none, the device's memory is its budget.
    pub fn within(&self, budgets: &[Option<u64>]) -> Machine {
        let mut machine = self.clone();
        for (device, budget) in machine.devices.iter_mut().zip(budgets) {
            device.memory = budget.or(device.memory);
        }
        machine
    }

    /// The way from one device to another.
    pub fn link(&self, from: usize, to: usize) -> Link {
        let named = self.links.iter().find(|profile| profile.from == from && profile.to == to);
        named.map_or(self.link, |profile| profile.link)
    }

    /// What was measured of a gang of such adapters that divide layers like this, with tensors that travel as this.
    pub fn gang(&self, devices: &[usize], (division, wire): (&Division, Wire)) -> Option<&DeviceProfile> {
        let adapters =
            |devices: &[usize]| devices.iter().map(|&device| self.adapter(device)).collect::<Vec<_>>();
        let is_alike = |gang: &&GangProfile| {
            gang.division == *division
                && gang.wire == wire
                && (gang.devices == devices || adapters(&gang.devices) == adapters(devices))
        };
        self.gangs.iter().find(is_alike).map(|gang| &gang.profile)
    }

    /// How many times longer device `i` takes while device `j` is busy.
    pub fn slowdown(&self, i: usize, j: usize) -> f64 {
        self.slowdown.get(i).and_then(|row| row.get(j)).copied().unwrap_or(1.0)
    }
}

impl LayerProfile {
    /// F, I, W and B.
    pub fn times(&self) -> [f64; 4] {
        let backward = self.backward.unwrap_or(self.input + self.weight);
        [self.forward, self.input, self.weight, backward]
    }

    /// F, I and W together.
    pub fn sum(&self) -> f64 {
        self.forward + self.input + self.weight
    }
}

impl DeviceProfile {
    /// Makes everything that it computes take `factor` times as long.
    pub fn scale(&mut self, factor: f64) {
        for layer in self.shapes.iter_mut().flat_map(|shape| shape.layers.values_mut()) {
            layer.forward *= factor;
            layer.input *= factor;
            layer.weight *= factor;
            layer.backward = layer.backward.map(|seconds| seconds * factor);
        }
        self.rates.matmul_gflops /= factor;
        self.rates.memory_gb_s /= factor;
    }

    /// What was measured for microbatches of this shape.
    pub fn shape(&self, shape: &str) -> Option<&ShapeProfile> {
        self.shapes.iter().find(|profile| profile.shape == shape)
    }

    /// Adds a shape, or puts it in the place of what was measured for it before.
    pub fn put(&mut self, shape: ShapeProfile) {
        match self.shapes.iter_mut().find(|profile| profile.shape == shape.shape) {
            Some(profile) => *profile = shape,
            None => self.shapes.push(shape),
        }
    }
}
