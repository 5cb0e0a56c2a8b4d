//! Devices that divide every layer, for the planner: which they are, and what the machine of their gangs is.

use crate::error::{Error, Result};
use crate::plan::text::counted;
use crate::plan::{Divided, Machine, Workload};
use crate::timeline::DeviceName;

/// The gangs of a machine's devices.
#[derive(Clone)]
pub(super) struct Gangs {
    /// The share of each member.
    pub shares: Vec<usize>,
    /// The members of each gang, by the numbers of their devices.
    pub gangs: Vec<Vec<usize>>,
    /// The machine as it is.
    pub devices: Machine,
    /// Its devices, for people.
    pub names: Vec<DeviceName>,
    /// Bytes that devices may use beside what they have.
    pub budgets: Vec<Option<u64>>,
    whole: Workload,
    /// What each member does.
    pub parts: Vec<Workload>,
    /// The member with the largest share.
    pub largest: usize,
}

impl Gangs {
    /// Neighbours among these devices, or among all, of which each has its share of every layer.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a number of devices that does not make whole gangs.
    pub fn new(
        shares: &[usize],
        whole: Workload,
        parts: Vec<Workload>,
        devices: Machine,
        names: Vec<DeviceName>,
        chosen: Option<&[usize]>,
    ) -> Result<Gangs> {
        let all: Vec<usize> = chosen.map_or_else(|| (0..devices.devices.len()).collect(), <[usize]>::to_vec);
        let count = shares.len();
        if all.is_empty() || !all.len().is_multiple_of(count) {
            let message = format!(
                "gangs of {count} cannot be made of {}; use a multiple of {count} (pipeline.devices, --devices)",
                counted(all.len(), "device")
            );
            return Err(Error::config("mesh.tensor", message));
        }
        let largest = (0..count).rev().max_by_key(|&member| shares[member]).unwrap_or(0);
        let gangs = all.chunks(count).map(<[usize]>::to_vec).collect();
        let (shares, budgets) = (shares.to_vec(), Vec::new());
        Ok(Gangs { shares, gangs, devices, names, budgets, whole, parts, largest })
    }

    fn divided(&self) -> Divided<'_> {
        Divided { whole: &self.whole, parts: &self.parts, largest: self.largest, shares: &self.shares }
    }

    /// The machine whose devices are the gangs.
    pub fn machine(&self) -> Machine {
        self.divided().machine(&self.devices, &self.gangs)
    }

    /// What the gangs are called.
    pub fn called(&self) -> Vec<DeviceName> {
        let name = |gang: &Vec<usize>| {
            let names: Vec<String> = gang.iter().map(|&device| self.names[device].title()).collect();
            names.join(" + ")
        };
        DeviceName::list(self.gangs.iter().map(name))
    }

    /// Limits devices to so many bytes, by their numbers: what that is for each gang.
    pub fn limit(&mut self, mut budgets: Vec<Option<u64>>) -> Vec<Option<u64>> {
        budgets.resize(self.devices.devices.len(), None);
        self.budgets = budgets;
        let divided = self.divided();
        let of = |gang: &Vec<usize>| divided.memory(gang.iter().map(|&device| self.budget(device)));
        self.gangs.iter().map(of).collect()
    }

    /// Bytes that a device may use.
    pub fn budget(&self, device: usize) -> Option<u64> {
        self.budgets.get(device).copied().flatten().or(self.devices.devices[device].memory)
    }
}
