#include <stdio.h>
#include "where.h"

int main(void)
{
	printf("Hello from an image that kiln built.\n");
	printf("Compiled on:  %s\n", KERNEL);
	printf("Build number: %d\n", BUILDS);
	return 0;
}
