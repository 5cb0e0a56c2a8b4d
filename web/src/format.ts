// Numbers as people read them, each kind with a steady width.
const narrow = "\u202f";

/** 12.3 ms, 1.24 s. */
export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return "–";
  const ms = seconds * 1e3;
  if (ms < 0.0995) return `${(ms * 1e3).toFixed(0)}${narrow}µs`;
  if (ms < 9.995) return `${ms.toFixed(2)}${narrow}ms`;
  if (ms < 99.95) return `${ms.toFixed(1)}${narrow}ms`;
  if (ms < 999.5) return `${ms.toFixed(0)}${narrow}ms`;
  return `${seconds.toFixed(seconds < 9.995 ? 2 : 1)}${narrow}s`;
}

export const percent = (part: number) => (Number.isFinite(part) ? `${(part * 100).toFixed(0)}${narrow}%` : "–");

export const finePercent = (part: number) => (Number.isFinite(part) ? `${(part * 100).toFixed(1)}${narrow}%` : "–");

export function bytes(n: number): string {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) {
    n /= 1024;
    unit++;
  }
  return `${n.toFixed(unit === 0 || n >= 100 ? 0 : 1)}${narrow}${units[unit]}`;
}

/** 12 345, with narrow spaces. */
export const whole = (n: number) =>
  Number.isFinite(n)
    ? Math.round(n)
        .toString()
        .replace(/\B(?=(\d{3})+(?!\d))/g, narrow)
    : "–";

/** 812, 12.3 thousand, 1.2 million. */
export function about(n: number): string {
  if (n >= 1e6) return `${(n / 1e6).toFixed(1)} million`;
  if (n >= 1e4) return `${(n / 1e3).toFixed(0)} thousand`;
  return whole(n);
}

export const loss = (value: number) => (Number.isFinite(value) ? value.toFixed(4) : "–");

export const times = (factor: number) => `${factor.toFixed(factor < 10 ? 2 : 1)}×`;
