//! Pipelines of which some stages have more replicas than others: a large card beside two small ones that take turns.
//!
//! As in [`teams`](super::teams) the search for one pipeline runs over teams of devices, only that these are of unequal sizes:
//! a team is a device as fast as all its members together. Every pipeline so found is then taken apart: the members of a team
//! have its list of actions with the microbatches dealt out among them, which leaves each list in an order that the whole
//! pipeline has, and so none of them can wait for ever.

use std::ops::Range;

use super::costs::Prices;
use super::judge::Judge;
use super::machine::Machine;
use super::search::{Board, allowance, search};
use super::space::{Pool, Space};
use super::start::seconds;
use super::teams::{MOST_PIPELINES, PART, WORK_OF_CHANGES, improved, of_teams};
use super::workload::Workload;
use super::{Candidate, DataChoice, Options};
use crate::error::Result;
use crate::schedule::Schedule;

/// The best plans found in which stages have unequal numbers of replicas; none where the options leave none.
///
/// # Errors
///
/// [`Error::Config`](crate::error::Error::Config) for options that contradict one another.
pub(super) fn uneven(workload: &Workload, machine: &Machine, options: &Options) -> Result<Vec<Candidate>> {
    if options.devices.is_some() || options.data != DataChoice::Any {
        return Ok(Vec::new());
    }
    let groupings = groupings(machine);
    let part = PART * groupings.len() as u64;
    let mut found = Vec::new();
    for teams in groupings {
        found.extend(over(workload, machine, options, &teams, part)?);
    }
    Ok(found)
}

/// For each number of teams one way to make teams of all devices that are about as fast as one another; not where each team
/// has as many members.
fn groupings(machine: &Machine) -> Vec<Vec<Vec<usize>>> {
    let speed = |device: usize| machine.devices[device].rates.matmul_gflops;
    let mut devices: Vec<usize> = Pool::new(machine, None).classes.iter().flatten().copied().collect();
    devices.sort_by(|&a, &b| speed(b).total_cmp(&speed(a)));
    let of = |count: usize| {
        let mut teams = vec![Vec::new(); count];
        for &device in &devices {
            let sum = |team: &Vec<usize>| team.iter().map(|&member| speed(member)).sum::<f64>();
            let Some(slowest) = teams.iter_mut().min_by(|a, b| sum(a).total_cmp(&sum(b))) else { break };
            slowest.push(device);
        }
        teams
    };
    let is_uneven = |teams: &Vec<Vec<usize>>| teams.iter().any(|team| team.len() != teams[0].len());
    (2..devices.len()).map(of).filter(is_uneven).collect()
}

/// The fastest pipelines over teams, taken apart.
fn over(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    teams: &[Vec<usize>],
    part: u64,
) -> Result<Vec<Candidate>> {
    let mut together = of_teams(machine, teams);
    for (device, team) in together.devices.iter_mut().zip(teams) {
        device.scale(1.0 / team.len() as f64);
    }
    let inner = Options { budgets: Vec::new(), data: DataChoice::Count(1), ..options.clone() };
    // What no pipeline over these teams can be is no mistake of anybody.
    let Ok(space) = Space::new(workload, &together, &inner) else { return Ok(Vec::new()) };
    let mut judge = Judge::new(&space)?;
    let mut board = Board::default();
    search(&mut judge, &mut board, allowance(&space) / part)?;
    let mut found = Vec::new();
    for timed in board.ranked(&space).iter().take(MOST_PIPELINES) {
        let form = judge.form_of(timed);
        let batching = &workload.batchings[space.batchings[form.batching]];
        let prices = Prices::new(workload, batching, machine);
        let ranks: Vec<&[usize]> = timed.point.devices.iter().map(|&team| &teams[team][..]).collect();
        let pace = |rank: usize, device: usize| -> f64 {
            let own =
                form.layout.own[rank].iter().map(|&replica| form.layout.placement.replicas()[replica].stage);
            own.map(|stage| seconds(&prices, device, &timed.point.stages[stage])).sum()
        };
        let schedule = taken_apart(&form.schedule, &ranks, pace);
        let devices = ranks.concat();
        // A member without a microbatch belongs to another grouping.
        if schedule.ranks.iter().all(|actions| !actions.is_empty()) {
            let stages: Vec<Range<usize>> = timed.point.stages.clone();
            found.extend(improved(workload, machine, options, schedule, devices, stages, WORK_OF_CHANGES)?);
        }
    }
    Ok(found)
}

/// A schedule of which each rank is several devices, as one of the devices: each microbatch of a rank goes to the member that
/// will have ended it first, `pace` being the seconds that a device needs for one at a rank.
fn taken_apart(schedule: &Schedule, teams: &[&[usize]], pace: impl Fn(usize, usize) -> f64) -> Schedule {
    let mut ranks = Vec::new();
    for (rank, (actions, team)) in schedule.ranks.iter().zip(teams).enumerate() {
        let paces: Vec<f64> = team.iter().map(|&device| pace(rank, device)).collect();
        let mut ends = vec![0.0; team.len()];
        let of_each: Vec<usize> = (0..schedule.microbatches)
            .map(|_| {
                let end = |member: &usize| ends[*member] + paces[*member];
                let next = (0..team.len()).min_by(|a, b| end(a).total_cmp(&end(b))).unwrap_or_default();
                ends[next] += paces[next];
                next
            })
            .collect();
        for member in 0..team.len() {
            let own = actions.iter().filter(|action| of_each[action.microbatch] == member);
            ranks.push(own.copied().collect());
        }
    }
    Schedule { ranks, ..schedule.clone() }
}
