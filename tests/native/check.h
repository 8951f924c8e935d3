// What the native tests check with: a failure names its line and ends the test.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "packhorse.h"

namespace {

[[maybe_unused]] char error[512];  // of the last call that failed

void check(bool condition, const char* what, int line) {
  if (condition) return;
  fprintf(stderr, "line %d: %s\n", line, what);
  exit(1);
}

}  // namespace

#define CHECK(condition) check(condition, #condition, __LINE__)
#define OK(call) check((call) == PH_OK, error, __LINE__)
