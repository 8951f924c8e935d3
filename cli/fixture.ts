import { fileURLToPath } from "node:url";

/** The cache of a small model that ships with Packhorse, from its root: the data where a user names none. */
export const FIXTURE = "tests/fixtures/tiny/kv.safetensors";

/** Its path. */
export const FIXTURE_PATH = fileURLToPath(new URL(`../${FIXTURE}`, import.meta.url));

/** The model that it is of. */
export const FIXTURE_MODEL_PATH = fileURLToPath(new URL("../tests/fixtures/tiny", import.meta.url));
