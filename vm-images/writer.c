/*
 * writer: the guest's half of the tests' oracle.  tests/records.py is the other half.
 *
 *   writer DEVICE SEED LANES RATE TTY
 *
 * Each lane, a process with its own share of the device, writes numbered records at
 * random places, flushes, and only then says so on the serial port.  A line is on the
 * host before the lane goes on (tcdrain), so past the last line that the host has,
 * at most one record per lane is in flight.  RATE is records per second and lane, 0 for
 * as many as go.  What is said:
 *
 *   W <device> <seed> <lanes> <slots>    a run begins; slots per lane, 16 KiB each
 *   S <lane> <seq>                       the lane begins with this record
 *   A <lane> <seq> <slot> <usec>         the record is durable; time of write and flush
 *   E <lane> <seq> <errno>               it could not be written; the lane stops
 *
 * A lane goes on after the highest whole record of its seed that its share holds, so a
 * guest that boots again by its own command line continues.  Slots are counted over the
 * device: lane l has slots l * slots to (l + 1) * slots - 1.
 *
 * A record: struct header, pseudo-random bytes, and the CRC-32 of all before it.  Where it
 * goes and how long it is follow from (seed, lane, seq) alone.  Little endian.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { SLOT = 16384, SECTOR = 512, VERSION = 1, SLOTS_AT_ONCE = 64 };
static const char MAGIC[8] = "PROMOREC";

struct header {
    char magic[8];
    uint32_t version, lane;
    uint64_t seed, seq;
    uint32_t slot, length;
};

struct lane {
    int disk, tty;
    uint64_t seed;
    uint32_t number, slots;
    unsigned rate;
    unsigned char *buffer;
};

static volatile sig_atomic_t stopping;
static uint32_t crc_table[256];

static void stop(int signal) { (void)signal; stopping = 1; }

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void make_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
        crc_table[i] = c;
    }
}

static uint32_t crc32(const unsigned char *bytes, size_t count)
{
    uint32_t c = ~0u;
    while (count--)
        c = crc_table[(c ^ *bytes++) & 255] ^ c >> 8;
    return ~c;
}

static uint64_t splitmix64(uint64_t z)
{
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static uint64_t key_of(const struct lane *lane, uint64_t seq)
{
    return splitmix64(splitmix64(splitmix64(lane->seed) ^ lane->number) ^ seq);
}

/* One write(2) a line, which the terminal does not interleave with another's. */
static void say(int tty, const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (write(tty, line, length) != length || tcdrain(tty) < 0)
        die("serial port");
}

static uint64_t now_usec(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static void sleep_until(uint64_t usec)
{
    struct timespec t = { usec / 1000000, usec % 1000000 * 1000 };
    while (!stopping && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

/* Puts the record into the lane's buffer. */
static struct header make_record(struct lane *lane, uint64_t seq)
{
    uint64_t key = key_of(lane, seq);
    struct header header = {
        .version = VERSION, .lane = lane->number, .seed = lane->seed, .seq = seq,
        .slot = lane->number * lane->slots + key % lane->slots,
        .length = SECTOR * (1 + (key >> 32) % (SLOT / SECTOR)),
    };
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    for (size_t at = 0; at < header.length; at += 8) {
        uint64_t word = splitmix64(key + at);
        memcpy(lane->buffer + at, &word, 8);
    }
    memcpy(lane->buffer, &header, sizeof header);
    uint32_t crc = crc32(lane->buffer, header.length - 4);
    memcpy(lane->buffer + header.length - 4, &crc, 4);
    return header;
}

static int write_durably(struct lane *lane, const struct header *header)
{
    ssize_t count = pwrite(lane->disk, lane->buffer, header->length, (off_t)header->slot * SLOT);
    if (count != (ssize_t)header->length)
        return count < 0 ? errno : EIO;
    return fdatasync(lane->disk) < 0 ? errno : 0;
}

/* The seq of the whole record in the slot if it is above `best`, else `best`. */
static uint64_t better(const struct lane *lane, const unsigned char *slot, uint64_t best)
{
    struct header h;
    uint32_t crc;
    memcpy(&h, slot, sizeof h);
    if (memcmp(h.magic, MAGIC, sizeof MAGIC) || h.version != VERSION || h.seed != lane->seed ||
        h.lane != lane->number || h.seq <= best || h.length < SECTOR || h.length > SLOT)
        return best;
    memcpy(&crc, slot + h.length - 4, 4);
    return crc == crc32(slot, h.length - 4) ? h.seq : best;
}

static uint64_t highest_seq(const struct lane *lane)
{
    uint64_t best = 0;
    for (uint32_t i = 0; i < lane->slots; i += SLOTS_AT_ONCE) {
        uint32_t left = lane->slots - i, count = left < SLOTS_AT_ONCE ? left : SLOTS_AT_ONCE;
        off_t at = ((off_t)lane->number * lane->slots + i) * SLOT;
        if (pread(lane->disk, lane->buffer, count * SLOT, at) != count * SLOT)
            die("read");
        for (uint32_t slot = 0; slot < count; slot++)
            best = better(lane, lane->buffer + slot * SLOT, best);
    }
    return best;
}

static void run(struct lane *lane)
{
    uint64_t seq = highest_seq(lane) + 1, due = now_usec();
    say(lane->tty, "S %u %" PRIu64 "\n", lane->number, seq);
    for (; !stopping; seq++) {
        struct header header = make_record(lane, seq);
        uint64_t begin = now_usec();
        int error = write_durably(lane, &header);
        if (error) {
            say(lane->tty, "E %u %" PRIu64 " %d\n", lane->number, seq, error);
            return;
        }
        uint64_t end = now_usec();
        say(lane->tty, "A %u %" PRIu64 " %u %" PRIu64 "\n",
            lane->number, seq, header.slot, end - begin);
        if (lane->rate) {
            due += 1000000 / lane->rate;
            if (due < end)
                due = end;
            sleep_until(due);
        }
    }
}

static int open_tty(const char *path)
{
    struct termios mode;
    int tty = open(path, O_WRONLY | O_NOCTTY);
    if (tty < 0 || tcgetattr(tty, &mode) < 0)
        die(path);
    cfmakeraw(&mode);
    mode.c_cflag |= CLOCAL;
    cfsetspeed(&mode, B115200);
    if (tcsetattr(tty, TCSANOW, &mode) < 0)
        die(path);
    return tty;
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: writer DEVICE SEED LANES RATE TTY\n");
        return 2;
    }
    struct lane lane = {
        .disk = open(argv[1], O_RDWR | O_DIRECT), .tty = open_tty(argv[5]),
        .seed = strtoull(argv[2], NULL, 0), .rate = strtoul(argv[4], NULL, 0),
    };
    uint32_t lanes = strtoul(argv[3], NULL, 0);
    off_t size = lseek(lane.disk, 0, SEEK_END);
    if (size < 0 || !lanes || posix_memalign((void **)&lane.buffer, 4096, SLOT * SLOTS_AT_ONCE))
        die(argv[1]);
    lane.slots = size / SLOT / lanes;
    make_crc_table();
    sigaction(SIGTERM, &(struct sigaction){ .sa_handler = stop, .sa_flags = SA_RESTART }, NULL);
    /* The empty line ends one that a killed guest may have left unfinished. */
    say(lane.tty, "\nW %s %" PRIu64 " %u %u\n", argv[1], lane.seed, lanes, lane.slots);
    for (; lane.number < lanes; lane.number++)
        if (fork() == 0) {
            run(&lane);
            return 0;
        }
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}
