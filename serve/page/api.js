// The service's API, and the key that it may ask for.

const STORED = "onethreshold-key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(STORED, key);
}

/** JSON of the service; `body` makes it a POST. Throws Refused with the service's own words. */
export async function ask(path, body) {
  const answer = await send(path, body);
  const read = await answer.json().catch(() => null);
  if (!answer.ok) {
    throw new Refused(answer.status, read?.error?.message ?? `the service answered with status ${answer.status}`);
  }
  return read;
}

/** An address under which an image of the service can be shown; null when there is none. */
export async function picture(path) {
  const answer = await send(path);
  return answer.ok ? URL.createObjectURL(await answer.blob()) : null;
}

/** An image file as the base64 that the service takes. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refused(0, `${file.name || "the image"} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function send(path, body) {
  const headers = {};
  const key = sessionStorage.getItem(STORED);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Refused(0, "the service cannot be reached");
  }
}
